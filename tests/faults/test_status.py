"""The status file is true however a process ends."""

import json
import signal
import subprocess
import sys
import time

import pytest

from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.status import Status
from tests.faults.ranks import Ranks


def _status(run):
  return json.loads((run / 'status.json').read_text())


@pytest.mark.slow
def test_a_killed_run_is_known_to_be_and_its_lost_work_is_counted(tmp_path):
  run = tmp_path / 'run'
  loop = {'total_steps': 1_000_000, 'log_every_steps': 10, 'checkpoint_every_steps': 100_000}
  with Ranks(run, 1, loop=loop) as ranks:
    ranks.wait_for('training', step=400)
    # The status is written at most once a second, which may be more steps than that.
    end = time.monotonic() + 30
    while not _status(run)['step'] and time.monotonic() < end:
      time.sleep(0.01)
    assert _status(run)['retry'] is True
    ranks.signal(0, signal.SIGKILL)
    assert ranks.codes() == [-signal.SIGKILL]
    end = time.monotonic() + 10
    while _status(run)['state'] == 'training' and time.monotonic() < end:
      time.sleep(0.05)
  status = _status(run)
  assert (status['state'], status['retry']) == ('killed', True)
  assert 'the process ended without a word while training' in status['message']
  assert status['step'] > 0 and status['goodput']['step'] > 0
  with Ranks(run, 1, loop=loop | {'total_steps': 20}) as ranks:
    assert ranks.codes() == [0]
  after = _status(run)
  assert after['state'] == 'finished' and after['retry'] is False
  # Nothing had been saved: all that the first start did was in vain.
  lost = sum(status['goodput'].values())
  assert after['goodput']['lost'] == pytest.approx(lost, rel=1e-6) and lost > 1
  assert 0 < after['goodput']['down'] < 60


def test_a_final_word_is_the_last(tmp_path):
  status = Status(RunDirectory(tmp_path), 0, 1)
  status('training', step=3)
  assert _status(tmp_path)['state'] == 'training'
  status('diverged', step=4, message='NaN')
  status('training', step=5)
  status.close()
  found = _status(tmp_path)
  assert (found['state'], found['retry'], found['step']) == ('diverged', False, 4)


def test_only_process_0_writes_what_goes_on_and_anyone_writes_why_it_ends(tmp_path):
  status = Status(RunDirectory(tmp_path), 1, 2)
  status('training', step=3)
  assert not (tmp_path / 'status.json').exists()
  status('stalled', everyone=True, step=3, message='no step')
  status.close()
  assert _status(tmp_path)['message'] == 'no step' and _status(tmp_path)['retry'] is True


_KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.status import Status

class Dies(RunDirectory):
  def write_json(self, name, value):
    super().write_json(name, value)
    if value['step'] == 4:
      os.kill(os.getpid(), signal.SIGKILL)

status = Status(Dies(pathlib.Path(sys.argv[1])), 0, 1)
status('training', step=3)
status(sys.argv[2], step=4)
"""


@pytest.mark.parametrize('last, state', [('training', 'killed'), ('finished', 'finished')])
def test_a_kill_right_after_the_file_was_written_takes_nothing_back(tmp_path, last, state):
  # The keeper inherits the pipe, so reading to its end waits for the keeper, too.
  command = [sys.executable, '-c', _KILLED_WHILE_WRITING, str(tmp_path), last]
  child = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
  assert child.returncode == -signal.SIGKILL
  found = _status(tmp_path)
  assert (found['state'], found['step']) == (state, 4)
