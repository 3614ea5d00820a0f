"""Pipes in the place of a run's files: never opened, for they would wait for ever."""

import os

import pytest

from tests import tiny

SECONDS = 120


@pytest.fixture(scope='module')
def points(once, command):
  """A run on points that has finished, and its recipe."""

  def make(folder):
    config = tiny.write_config(folder / 'recipe.py', tiny.toy_config())
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('points_among_pipes', make)


def test_a_run_goes_on_among_pipes(points, small_data, tmp_path, copy_of):
  """The newest checkpoint counts as damaged, the grid is passed over."""
  run = copy_of(points / 'run')
  newest = max(int(p.name) for p in (run / 'checkpoints').iterdir() if p.name.isdecimal())
  grid = next((run / 'samples').glob('step_*.png'))
  for path in (grid, run / 'checkpoints' / str(newest) / 'manifest.json'):
    path.unlink()
    os.mkfifo(path)
  arguments = ['train', '--config', str(points / 'recipe.py'), '--workdir', str(run), '--quiet']
  process = tiny.start(arguments, tiny.environment(small_data, 1))
  try:
    _, said = process.communicate(timeout=SECONDS)
  finally:
    process.kill()
  assert process.returncode == 0, said
  assert f'checkpoints/{newest} is damaged (manifest.json is missing)' in said
  assert (run / 'report.html').stat().st_size > 0
