"""A run on a disk that is full or cannot be written: it goes on, waits, and tells the truth."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffusion_jax.evaluation.points import Points, PointsPreview
from diffusion_jax.train import loop
from tests import tiny
from tests.faults.ranks import Ranks

LOOP = {
  'total_steps': 24, 'checkpoint_every_steps': 6, 'sample_every_steps': 4,
  'evaluate_every_steps': 8, 'evaluate_samples': 64,
}
SAFETY = {'checkpoint_retry_seconds': 0.2, 'room_timeout_seconds': 100.0}


@pytest.fixture
def recipe(tmp_path):
  return tiny.write_config(tmp_path / 'toy.py', tiny.toy_config(loop=LOOP, safety=SAFETY))


@pytest.fixture
def at(monkeypatch):
  """at({call: action}): does something before so many steps of the runs of a test."""
  put, calls = loop.put_batch, []

  def plan(actions):
    def planned(*arguments):
      calls.append(None)
      actions.get(len(calls), lambda: None)()
      return put(*arguments)

    monkeypatch.setattr(loop, 'put_batch', planned)

  return plan


def _fill(disk):
  with (disk / 'ballast').open('wb', buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(bytes(4096))


def _fill_with_files(disk, leave=16):
  """So many more can be made: enough for all but a checkpoint, which has more."""
  (disk / 'files').mkdir()
  for index in range(os.statvfs(disk).f_ffree - leave):
    (disk / 'files' / str(index)).touch()


def _status(run):
  return json.loads((run / 'status.json').read_text())


def _whole(run, steps=24):
  """Asserts that a run has finished and left out nothing."""
  status = _status(run)
  assert (status['state'], status['retry'], status['step']) == ('finished', False, steps)
  assert sorted(tiny.metrics(run)) == list(range(1, steps + 1))
  assert sorted(tiny.metrics(run, 'evaluation')) == [8, 16, 24]
  assert (run / 'checkpoints' / str(steps) / 'manifest.json').is_file()
  for name in ('config.json', 'versions.json', 'scores.json', 'step.json', 'README.md',
               'report.html', 'model/README.md', 'model/config.json'):
    assert (run / name).stat().st_size, name
  grids = [path.name for path in sorted((run / 'samples').iterdir())]
  assert grids == [f'step_{step:08d}.png' for step in range(4, steps + 1, 4)]


@pytest.mark.parametrize('first', [
  pytest.param(1, id='from the first step', marks=pytest.mark.slow), pytest.param(10, id='later'),
])
def test_a_full_disk_costs_no_step(command, recipe, small_disk, at, capsys, first):
  """Grids, evaluations, reports and checkpoints fall into the time in which nothing can be written.
  """
  disk = small_disk('size=24m')
  at({first: lambda: _fill(disk), 21: (disk / 'ballast').unlink})
  assert command('train', '--config', recipe, '--workdir', disk / 'run', '--quiet') == 0
  _whole(disk / 'run')
  said = capsys.readouterr().err
  assert 'samples/step_' in said and 'No space left on device' in said
  assert 'could not be saved (the disk is full' in said and 'checkpoints can be saved again' in said


def test_a_disk_that_can_only_be_read_costs_no_step(
  command, recipe, tmp_path, small_disk, at, capsys
):
  """Another file system, empty and read-only, in place of the workdir for some steps."""
  run = small_disk('size=1m')
  mount = lambda *arguments: subprocess.run(arguments, check=True)
  at({
    10: lambda: mount('mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(run)),
    22: lambda: mount('umount', '-l', str(run)),
  })
  subprocess.run(['umount', str(run)], check=True)  # It has shown that a mount is possible.
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  said = capsys.readouterr().err
  _whole(run)
  assert 'Read-only file system' in said and 'step 12 could not be saved' in said


def _when_said(capsys, words, action, said):
  """Does something once stderr has the words."""
  def watch():
    end = time.monotonic() + 120
    while words not in ''.join(said) and time.monotonic() < end:
      said.append(capsys.readouterr().err)
      time.sleep(0.05)
    action()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  return thread


def test_at_the_end_the_run_waits_for_room(command, recipe, small_disk, at, capsys):
  disk, said = small_disk('size=24m'), []
  run = disk / 'run'
  at({20: lambda: _fill(disk)})
  seen = []

  def make_room():
    time.sleep(0.7)
    seen.append((_status(run)['state'], (run / 'model').exists()))
    (disk / 'ballast').unlink()

  thread = _when_said(capsys, 'Waiting for room', make_room, said)
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  thread.join()
  _whole(run)
  assert seen[0][0] != 'finished'
  assert 'step 24 could not be saved (the disk is full' in ''.join(said)
  assert ''.join(said).count('Waiting for room') >= 1


@pytest.mark.parametrize('number', [
  pytest.param(None, id='time is up'),
  pytest.param(signal.SIGTERM, id='signal', marks=pytest.mark.slow),
])
def test_without_its_last_checkpoint_a_run_has_not_finished(
  command, recipe, small_disk, at, capsys, number
):
  """There is room for a few files, also the model, but not for a checkpoint."""
  disk, said = small_disk('size=64m,nr_inodes=400'), []
  run = disk / 'run'

  def fill():
    end = time.monotonic() + 60
    while {path.name for path in (run / 'checkpoints').iterdir()} - {'scores.json'} != {'12', '18'}:
      assert time.monotonic() < end  # What is deleted in the background would make room again.
      time.sleep(0.01)
    _fill_with_files(disk)

  at({20: fill})
  arguments = ['train', '--config', recipe, '--workdir', run, '--quiet']
  if number is None:
    code = command(*arguments, '--config.safety.room_timeout_seconds=0.5')
    assert code == 75
    said.append(capsys.readouterr().err)
  else:
    thread = _when_said(capsys, 'Waiting for room', lambda: os.kill(os.getpid(), number), said)
    assert command(*arguments) == 143
    thread.join()
  status = _status(run)
  assert status['state'] == ('unsaved' if number is None else 'interrupted') and status['retry']
  assert 'step 24 could not be saved (the disk is full' in status['message']
  steps = [int(path.name) for path in (run / 'checkpoints').iterdir() if path.is_dir()]
  assert 12 <= max(steps) < 24
  shutil.rmtree(disk / 'files')
  assert command(*arguments) == 0
  _whole(run)


@pytest.mark.slow
def test_what_no_room_would_help_is_not_waited_for(command, recipe, tmp_path, capsys):
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'model').write_text('in the way')
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 1
  status = _status(run)
  assert (status['state'], status['retry'], status['step']) == ('unsaved', False, 24)
  assert 'the model could not be exported' in status['message']
  assert 'the run has not finished: the model could not be exported' in capsys.readouterr().err
  assert (run / 'checkpoints' / '24' / 'manifest.json').is_file()
  (run / 'model').unlink()
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  _whole(run)


@pytest.mark.slow
def test_a_start_on_a_full_disk(command, recipe, small_disk, at, capsys):
  """What goes on needs no room until its next checkpoint."""
  disk = small_disk('size=24m')
  at({5: lambda: os.kill(os.getpid(), signal.SIGTERM), 15: lambda: (disk / 'ballast').unlink()})
  arguments = ('train', '--config', recipe, '--workdir', disk / 'run', '--quiet')
  assert command(*arguments) == 143
  _fill(disk)
  assert command(*arguments) == 0
  _whole(disk / 'run')
  assert 'status.json cannot be written (' in capsys.readouterr().err


@pytest.mark.parametrize('where', [PointsPreview, pytest.param(Points, marks=pytest.mark.slow)])
def test_a_bug_in_what_only_shows_ends_no_run(
  command, recipe, tmp_path, capsys, monkeypatch, where
):
  def broken(*arguments, **options):
    raise RuntimeError('the moon is full')

  monkeypatch.setattr(where, 'run', broken)
  run = tmp_path / 'run'
  assert command('train', '--config', recipe, '--workdir', run, '--quiet') == 0
  status = _status(run)
  assert status['state'] == 'finished' and 'the moon is full' in status['message']
  assert re.search(r'\(\d times\)', status['message'])
  assert capsys.readouterr().err.count('the moon is full') == 1
  assert (run / 'model' / 'diffusion_pytorch_model.safetensors').is_file()


@pytest.mark.slow
def test_what_is_said_may_go_to_a_full_disk(recipe, tmp_path):
  if not os.path.exists('/dev/full'):
    pytest.skip('there is no /dev/full here')
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-m', 'diffusion_jax', 'train', '--config', recipe, '--workdir',
       str(tmp_path / 'run')],
      env=tiny.environment('', devices=1), cwd=tiny.ROOT, stdout=full, stderr=full, timeout=200,
    )
  assert done.returncode == 0
  _whole(tmp_path / 'run')


@pytest.mark.slow
def test_two_processes_wait_together_for_room(small_disk):
  """One of them is told to stop meanwhile; the next start finds room."""
  disk = small_disk('size=32m')
  run = disk / 'run'
  changes = {'settings': {'width': 512}, 'loop': {'total_steps': 20}, 'safety': SAFETY}
  _fill(disk)
  os.truncate(disk / 'ballast', (disk / 'ballast').stat().st_size - 4_000_000)
  with Ranks(run, 2, **changes) as ranks:
    waiting = ranks.wait_for('saving')
    assert 'step 20 could not be saved (the disk is full' in waiting['message']
    ranks.signal(1)
    assert ranks.codes() == [143, 143]
  assert _status(run)['state'] == 'interrupted'
  with Ranks(run, 2, **changes) as ranks:
    ranks.wait_for('saving')
    (disk / 'ballast').unlink()
    assert ranks.codes() == [0, 0]
  assert _status(run)['state'] == 'finished' and (run / 'checkpoints' / '20').is_dir()
