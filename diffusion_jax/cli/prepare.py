"""prepare: make a data set on disk."""

import argparse
import dataclasses
from typing import Annotated

from diffusion_jax.cli.options import add_options, check_overrides, read_options
from diffusion_jax.data.prepare.options import SourceOptions
from diffusion_jax.errors import UserError
from diffusion_jax.files import say
from diffusion_jax.limits import Help

HELP = 'make a data set on disk, or what a training keeps of it'
DESCRIPTION = """Makes a data set once, as ArrayRecord files that training reads at random. openmoji
is rendered from the SVGs of an installed package; nothing is downloaded.

With --source any pictures become records of one kind, in several processes: decoded once to see
that they can be, those that cannot be named and left out, split, and described in README.md and
card.html. Stopped or killed at any time, the same command goes on where it was.

With --config it encodes, once, what training by that config would: pictures by the autoencoder
(--latents), captions by the text encoders (--text). Training with --config.settings.cache=disk
then begins at once. Stopped at any time, it goes on where it was.

examples:
  python -m diffusion_jax prepare --dataset openmoji --size 64
  python -m diffusion_jax prepare --source folder:pictures --out data/pictures
  python -m diffusion_jax prepare --config openmoji/quickstart --latents --text \\
    --config.settings.cache_dir=caches/quickstart"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A data set, and where it goes."""

  dataset: Annotated[str, Help('openmoji', 'NAME')] = ''
  size: Annotated[int, Help('edge of the images: 32, 64 (default) or 128', 'PIXELS')] = 64
  data_dir: Annotated[str | None, Help(
    'folder of all data sets (default: $DIFFUSION_JAX_DATA, else ~/.cache/diffusion_jax/data)',
    'DIR'
  )] = None
  config: Annotated[str, Help('config file or recipe of a training, of which to fill the cache',
                              'FILE')] = ''
  latents: Annotated[bool, Help('with --config, encode the pictures')] = False
  text: Annotated[bool, Help('with --config, encode the captions')] = False
  workdir: Annotated[str, Help(
    'with --config, the workdir of the training, where settings.cache_dir is empty', 'DIR'
  )] = ''

  def __post_init__(self):
    if bool(self.config) != (self.latents or self.text):
      raise UserError('--config fills a cache with --latents, --text or both; give them together.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)
  add_options(parser, SourceOptions, "pictures of one's own")


def _write_records(source: SourceOptions, options: Options) -> int:
  from diffusion_jax.data.prepare.source import prepare_source
  from diffusion_jax.viz.data_card import write_data_card

  folder = prepare_source(
    source, options.size, options.data_dir or '', write_data_card,
    lambda text: say(text, 'diffusion_jax prepare: '),
  )
  print(f'the records are in {folder}: --config.data.dataset=records:{folder}')
  return 0


def _fill_cache(options: Options, overrides: list[str]) -> int:
  from diffusion_jax.backend.xla import enable_compile_cache
  from diffusion_jax.build import fill_cache
  from diffusion_jax.parallel.startup import start_distributed
  from diffusion_jax.recipe import load_config

  enable_compile_cache()
  start_distributed()
  kinds = ['latents'] * options.latents + ['texts'] * options.text
  folder = fill_cache(load_config(options.config, overrides), options.workdir, kinds)
  print(f'the cache is in {folder}')
  return 0


def run(args: argparse.Namespace) -> int:
  from diffusion_jax.data.sources.tfds import prepare_dataset

  check_overrides(args)
  options, source = read_options(Options, args), read_options(SourceOptions, args)
  if [bool(options.dataset), bool(options.config), bool(source.source)].count(True) != 1:
    raise UserError('one of --dataset, --source and --config is needed; give what to make.')
  if source.source:
    return _write_records(source, options)
  if options.config:
    return _fill_cache(options, args.overrides)
  folder = prepare_dataset(options.dataset, options.size, options.data_dir)
  print(f'the data set is in {folder}')
  return 0
