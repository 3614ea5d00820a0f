"""A disk that is full while a cache is written on it: a real one."""

import subprocess

import pytest

from diffusion_jax.data.cache import encoding
from diffusion_jax.errors import UserError
from tests import tiny
from tests.data import test_cache as cached


def test_what_was_encoded_before_a_disk_was_full_is_kept(small_disk, tmp_path, monkeypatch):
  monkeypatch.setattr(encoding, '_MOST_ROWS', 2)
  (tmp_path / 'pictures').mkdir()
  for number in range(8):
    cached.write_picture(tmp_path / 'pictures', number)
  disk = small_disk('size=600k')  # Each file of ArrayRecord has 128 kB or more.
  cache, source = disk / 'cache', cached.source_of(tmp_path / 'pictures')
  with pytest.raises(UserError, match=r'cannot be written .*No space.*what is there is kept'):
    cached.fill(source, cache)
  before = tiny.snapshot(cache)
  assert 1 < sum(name.endswith('.array_record') for name in before) < 8
  assert not [name for name in before if name.endswith('.tmp')]
  subprocess.run(['mount', '-o', 'remount,size=8m', str(disk)], check=True)
  found = cached.fill(source, cache)
  cached.assert_same(found, cached.fill(source, None))
  after = tiny.snapshot(cache)
  assert all(after[name] == data for name, data in before.items() if name.endswith('record'))
