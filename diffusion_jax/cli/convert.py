"""convert: a pipeline or a network from one layout to another."""

import argparse
import dataclasses
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.errors import require
from diffusion_jax.limits import Help

HELP = 'convert Stable Diffusion between file layouts'
DESCRIPTION = """Converts a pipeline of Stable Diffusion 1, 2, XL, 3, 3.5 or of Flux.1 between
the directory of diffusers, the single file of CompVis, Stability, Black Forest Labs and ComfyUI,
and our own directory, whose weights each device reads in place; also a text-to-image U-Net trained
here. A directory of one network is converted between diffusers and native; the transformer alone
from a single file, of safetensors or of PyTorch, by --type mmdit, flux, pixart or dit, and from its
directory to one.
Weights are converted one tensor at a time; nothing is downloaded and no code of a file is run.
The tensors of a file of PyTorch, such as the FID Inception's weights, become safetensors by the
layout tensors. A model that draws small pictures and others that enlarge them become one directory
by the layout cascade.

examples:
  python -m diffusion_jax convert --from sd15/ --to sd15.safetensors --layout single-file
  python -m diffusion_jax convert --from sd15.safetensors --to sd15/ --layout diffusers \\
    --tokenizer clip/
  python -m diffusion_jax convert --from sd15/ --to sd15-native/ --layout native --dtype bfloat16
  python -m diffusion_jax convert --from weights.pth --to weights.safetensors --layout tensors
  python -m diffusion_jax convert --from runs/16/model --stage runs/32/model \\
    --stage runs/64/model --to imagen --layout cascade"""


@dataclasses.dataclass(frozen=True)
class Options:
  """What is converted, and to what."""

  source: Annotated[str, Help(
    'a directory, or a .safetensors file with a whole model, or with --type a transformer', 'PATH',
    'from',
  )]
  target: Annotated[str, Help('what is written; it must not exist', 'PATH', 'to')]
  layout: Annotated[str, Help('diffusers, single-file, native, tensors or cascade', 'NAME')]
  stage: Annotated[tuple[str, ...], Help(
    'with --layout cascade: a model that enlarges what the one before it draws; repeat for several',
    'DIR'
  )] = ()
  dtype: Annotated[str | None, Help(
    'float32, float16 or bfloat16 (default: each tensor as it is)', 'NAME'
  )] = None
  kind: Annotated[str | None, Help(
    'the kind of one network, such as unet, where its config.json does not tell, or that alone is '
    'read of a single file', 'NAME', 'type'
  )] = None
  prediction: Annotated[str | None, Help(
    'epsilon or v_prediction: what the model in a single file predicts, where the file does not '
    'say it', 'NAME'
  )] = None
  tokenizers: Annotated[str | None, Help(
    "for a single file, which holds none: a folder with the tokenizer's files, or with tokenizer/, "
    'tokenizer_2/ and networks that the file lacks, such as text_encoder_2/ and vae/', 'DIR',
    'tokenizer',
  )] = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.formats.convert import convert

  options = vars(read_options(Options, args))
  stages = options.pop('stage')
  if options['layout'] == 'cascade':
    from diffusion_jax.pipelines.cascade import save

    extra = [name for name in ('dtype', 'kind', 'prediction', 'tokenizers') if options[name]]
    require(not extra, 'a cascade is of models as they are; leave all but --stage out.')
    save(options['target'], [options['source'], *stages])
    print(f'written to {options["target"]}')
    return 0
  require(not stages, '--stage is of --layout cascade; leave one out.')
  for note in convert(**options):
    print(note)
  print(f'written to {options["target"]}')
  return 0
