"""A real disk that can be full."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
  """small_disk(options): the mount point of a fresh tmpfs."""
  folder = tmp_path / 'disk'
  folder.mkdir()

  def mount(options):
    made = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)], capture_output=True, text=True
    )
    if made.returncode:
      pytest.skip(f'a tmpfs cannot be mounted here: {made.stderr.strip()}')
    return folder

  try:
    yield mount
  finally:
    subprocess.run(['umount', '-l', str(folder)], capture_output=True)
