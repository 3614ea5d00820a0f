"""Files that are whole or not there."""

import os

import pytest

from diffusion_jax.io.whole import replacing


def test_a_failure_leaves_what_was_there(tmp_path):
  path = tmp_path / 'new folder' / 'a.txt'
  with replacing(path, flushed=True) as file:
    file.write(b'whole')
  with pytest.raises(OSError, match='half'), replacing(path) as file:
    file.write(b'ha')
    raise OSError('half')
  assert path.read_bytes() == b'whole' and list(path.parent.iterdir()) == [path]


def test_several_may_write_one_file_at_once(tmp_path, monkeypatch):
  """Also in containers on one folder, whose processes have the same number."""
  monkeypatch.setattr(os, 'getpid', lambda: 1)
  path = tmp_path / 'plan.json'
  with replacing(path) as first:
    first.write(b'first')
    with replacing(path) as second:
      second.write(b'second')
    assert path.read_bytes() == b'second'
  assert path.read_bytes() == b'first' and list(tmp_path.iterdir()) == [path]
