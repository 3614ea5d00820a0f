"""convert: a pipeline or a network from one layout to another."""

import argparse

HELP = 'convert Stable Diffusion between file layouts'
DESCRIPTION = """Converts a pipeline of Stable Diffusion 1, 2 or XL between the directory of
diffusers, the single file of CompVis, Stability and ComfyUI, and our own directory, whose weights
each device reads in place; also a text-to-image U-Net trained here. A directory of one network is
converted between diffusers and native.
Weights are converted one tensor at a time; nothing is downloaded and no code of a file is run.
The tensors of a file of PyTorch, such as the FID Inception's weights, become safetensors by the
layout tensors.

examples:
  python -m diffusion_jax convert --from sd15/ --to sd15.safetensors --layout single-file
  python -m diffusion_jax convert --from sd15.safetensors --to sd15/ --layout diffusers \\
    --tokenizer clip/
  python -m diffusion_jax convert --from sd15/ --to sd15-native/ --layout native --dtype bfloat16
  python -m diffusion_jax convert --from weights.pth --to weights.safetensors --layout tensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--from', dest='source', required=True, metavar='PATH',
                      help='a directory, or a .safetensors file with a whole model')
  parser.add_argument('--to', dest='target', required=True, metavar='PATH',
                      help='what is written; it must not exist')
  parser.add_argument('--layout', required=True, metavar='NAME',
                      help='diffusers, single-file, native or tensors')
  parser.add_argument('--dtype', metavar='NAME', help='float32, float16 or bfloat16 '
                      '(default: each tensor as it is)')
  parser.add_argument('--type', dest='kind', metavar='NAME', help='the kind of one network, such '
                      'as unet, where its config.json does not tell')
  parser.add_argument('--prediction', metavar='NAME', help='epsilon or v_prediction: what the '
                      'model in a single file predicts, where the file does not say it')
  parser.add_argument('--tokenizer', metavar='DIR', help='for a single file, which holds none: a '
                      "folder with the tokenizer's files, or with tokenizer/ and tokenizer_2/")


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.formats.convert import convert

  notes = convert(
    args.source, args.target, args.layout, dtype=args.dtype, kind=args.kind,
    prediction=args.prediction, tokenizers=args.tokenizer,
  )
  for note in notes:
    print(note)
  print(f'written to {args.target}')
  return 0
