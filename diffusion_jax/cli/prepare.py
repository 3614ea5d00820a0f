"""prepare: make a data set on disk."""

import argparse
import dataclasses
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.limits import Help

HELP = 'make a data set on disk'
DESCRIPTION = """Makes a data set once, as ArrayRecord files that training reads at random. openmoji
is rendered from the SVGs of an installed package; nothing is downloaded.

example:
  python -m diffusion_jax prepare --dataset openmoji --size 64"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A data set, and where it goes."""

  dataset: Annotated[str, Help('openmoji', 'NAME')]
  size: Annotated[int, Help('edge of the images: 32, 64 (default) or 128', 'PIXELS')] = 64
  data_dir: Annotated[str | None, Help(
    'folder of all data sets (default: $DIFFUSION_JAX_DATA, else ~/.cache/diffusion_jax/data)',
    'DIR'
  )] = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.data.sources.tfds import prepare_dataset

  options = read_options(Options, args)
  folder = prepare_dataset(options.dataset, options.size, options.data_dir)
  print(f'the data set is in {folder}')
  return 0
