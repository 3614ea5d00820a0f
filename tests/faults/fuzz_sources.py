"""What is fuzzed of the sources of pictures: files that hold many of them."""

import itertools
import shutil

from tests.faults import fuzz_targets, mutants
from tests.faults.fuzz_adapters import lora
from tests.faults.fuzz_targets import Target, every, picture

COUNT = 24
"""Enough for a test part by content."""


def _source(kind, damaged, count):
  from diffusion_jax.config import DataConfig
  from diffusion_jax.data.sources import open_data
  from tests.data import kinds

  formats = itertools.cycle(('png', 'jpeg'))
  pictures = [(f'{i:02d}', picture(next(formats)), [f'number {i}']) for i in range(COUNT)]

  def make(folder):
    getattr(kinds, f'as_{kind}')(folder / 'x', pictures)

  def load(folder):
    # An index of what was sound does not count.
    shutil.rmtree(folder / 'index', ignore_errors=True)
    config = DataConfig(f'{kind}:{folder / "x"}', 16, str(folder / 'index'), test_fraction=0.2)
    for source in open_data(config):
      every(source)
      source.original_sizes()

  files = {f'x/{name}': how for name, how in damaged.items()}
  return Target(f'source_{kind}', make, load, files, count)


def records():
  shard = 'train-00000-of-00002'
  return _source('records', {
    'records.json': [mutants.any_json], f'{shard}.array_record': [mutants.any_bytes],
    f'{shard}.npy': [mutants.any_bytes],
  }, 150)


def tar():
  return _source('tar', {'0000.tar': [mutants.tar_file]}, 120)


def parquet():
  return _source('parquet', {'data-00000.parquet': [mutants.any_bytes]}, 80)


def arrow():
  return _source('arrow', {'data-00000.arrow': [mutants.any_bytes]}, 80)


GROUPS = {
  **fuzz_targets.GROUPS, 'weights': [lora, *fuzz_targets.GROUPS['weights']],
  'sources': [records, tar, parquet, arrow],
}
"""Of all targets, each for a process of its own."""
