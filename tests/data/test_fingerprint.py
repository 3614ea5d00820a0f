"""Fingerprints of data: a copy is the same, other pictures and other captions are not."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources.arrays import open_points
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.data.splits import fingerprint, spread
from tests.data.conftest import SIZE
from tests.tiny import folder_sources, labelled_sources


def picture(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
  for i in range(6):
    picture(tmp_path / 'data' / 'xy'[i % 2] / f'{i}.png', i)
  (tmp_path / 'data' / 'metadata.csv').write_text(
    'file_name,text\n' + ''.join(f'{"xy"[i % 2]}/{i}.png,caption {i}\n' for i in range(6))
  )
  return tmp_path / 'data'


def of(folder):
  return fingerprint(folder_sources(folder, 4)[0])


def test_a_copy_elsewhere_is_the_same(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / 'copy')
  for path in copy.rglob('*'):
    os.utime(path, (0, 0))
  assert of(copy) == of(folder)
  assert fingerprint(labelled_sources(copy, 4)[0]) == (
    fingerprint(labelled_sources(folder, 4)[0])
  )


@pytest.mark.parametrize(('change', 'changed'), [
  (lambda f: (f / 'metadata.csv').write_text(
    (f / 'metadata.csv').read_text().replace('caption 3', 'caption 4')), 'captions'),
  (lambda f: (f / 'x' / '0.png').write_bytes((f / 'x' / '2.png').read_bytes()), 'pictures'),
  (lambda f: _flip_a_byte(f / 'y' / '5.png'), 'pictures'),
])
def test_changes_are_seen_and_told_apart(folder, change, changed):
  before = of(folder)
  change(folder)
  after = of(folder)
  assert {part for part in before if before[part] != after[part]} == {changed}


def _flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[-20] ^= 1
  path.write_bytes(data)


def test_another_name_is_another_picture(folder):
  before = fingerprint(labelled_sources(folder, 4)[0])
  (folder / 'x' / '0.png').rename(folder / 'y' / '0.png')
  assert fingerprint(labelled_sources(folder, 4)[0]) != before


def reordered(path):
  """The same records in another order: as many, of the same sizes."""
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  reader = ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  path.unlink()
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for record in reversed(records):
    writer.write(record)
  writer.close()


def test_prepared_records(data_dir, tmp_path):
  opened = lambda root: open_source('openmoji', 'train', size=SIZE, data_dir=str(root))
  copy = shutil.copytree(data_dir, tmp_path / 'copy')
  before = fingerprint(opened(data_dir))
  assert before and fingerprint(opened(copy)) == before
  for path in copy.rglob('*train*array_record*'):
    reordered(path)
  changed = opened(copy)
  after = fingerprint(changed)
  assert len(changed) == len(opened(data_dir))
  assert all(after[part] != before[part] for part in ('captions', 'pictures'))


def test_what_is_computed_has_none():
  assert fingerprint(open_points('moons', 'train', 16)) == {}


def test_a_sample_is_spread_over_all():
  assert spread(5, 10) == [0, 1, 2, 3, 4] and spread(0, 3) == []
  assert spread(1001, 3) == [0, 500, 1000]
