"""OpenMoji at 32 px, prepared once for the whole session and rendered for real; small caches."""

import os

import pytest

from diffusion_jax.data.cache import encoding
from diffusion_jax.data.sources.tfds import open_source, prepare_dataset
from tests.data.cached import A_FILE, COUNT, write_picture

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


@pytest.fixture
def folder(tmp_path):
  """Pictures 1 to COUNT with two captions each."""
  (tmp_path / 'pictures').mkdir()
  for number in range(1, COUNT + 1):
    write_picture(tmp_path / 'pictures', number)
  return tmp_path / 'pictures'


@pytest.fixture
def small_files(monkeypatch):
  """Files of A_FILE rows."""
  monkeypatch.setattr(encoding, '_MOST_ROWS', A_FILE)


@pytest.fixture
def encoded(monkeypatch):
  """How many records of each kind have been encoded."""
  found = {'latents': 0, 'texts': 0}
  for kind in (encoding.Latents, encoding.Texts):
    def encode(self, numbers, of=kind.encode):
      found['texts' if self.name == 'texts' else 'latents'] += len(numbers)
      return of(self, numbers)

    monkeypatch.setattr(kind, 'encode', encode)

  def take():
    counts = dict(found)
    found.update(latents=0, texts=0)
    return counts

  return take
