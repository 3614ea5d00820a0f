"""prepare: make a data set on disk."""

import argparse

HELP = 'make a data set on disk'
DESCRIPTION = """Makes a data set once, as ArrayRecord files that training reads at random. openmoji
is rendered from the SVGs of an installed package; nothing is downloaded.

example:
  python -m diffusion_jax prepare --dataset openmoji --size 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--dataset', required=True, metavar='NAME', help='openmoji')
  parser.add_argument('--size', type=int, default=64, metavar='PIXELS',
                      help='edge of the images: 32, 64 (default) or 128')
  parser.add_argument('--data_dir', metavar='DIR', help='folder of all data sets (default: '
                      '$DIFFUSION_JAX_DATA, else ~/.cache/diffusion_jax/data)')


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.data.sources.tfds import prepare_dataset

  print(f'the data set is in {prepare_dataset(args.dataset, args.size, args.data_dir)}')
  return 0
