"""OpenMoji at 32 px, prepared once for the whole session and rendered for real."""

import os

import pytest

from diffusion_jax.data.sources.tfds import open_source, prepare_dataset

SIZE = 32


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  root = str(shared / 'data_sets')
  prepare_dataset('openmoji', SIZE, root)
  return root


@pytest.fixture(scope='session')
def records(data_dir):
  """Every record of both splits: {'train': [...], 'test': [...]}."""
  found = {}
  for split in ('train', 'test'):
    source = open_source('openmoji', split, size=SIZE, data_dir=data_dir)
    found[split] = [source[i] for i in range(len(source))]
  return found
