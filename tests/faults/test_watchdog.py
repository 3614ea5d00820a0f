"""Real processes that stop moving are ended, and say where they stood."""

import os
import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT

SCRIPT = str(ROOT / 'tests' / 'faults' / 'stuck.py')


def _run(directory, how):
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, SCRIPT, str(directory), how], env=env, capture_output=True, text=True,
    timeout=60,
  )
  return done, time.monotonic() - start


@pytest.mark.slow
def test_a_stalled_data_source(tmp_path):
  done, _ = _run(tmp_path, 'waiting for data')
  assert done.returncode == 75, done.stderr
  still, told = done.stdout.splitlines()
  assert still == 'still here'
  assert told.startswith('told: no step has been finished for') and 'stacks_0.txt' in told
  for text in (done.stderr, (tmp_path / 'stacks_0.txt').read_text()):
    assert 'stuck.py", line' in text and 'wait' in text


@pytest.mark.slow
def test_a_library_that_never_gives_back_the_interpreter(tmp_path):
  done, seconds = _run(tmp_path, 'holding the interpreter')
  assert done.returncode == 1 and 'still here' in done.stdout and seconds < 50
  assert 'stuck.py", line' in (tmp_path / 'stacks_0.txt').read_text()


@pytest.mark.slow
def test_a_closed_watchdog_ends_nothing(tmp_path):
  done, _ = _run(tmp_path, 'nothing')
  assert done.returncode == 0 and done.stdout.split('\n')[:2] == ['still here', 'done']
  assert not (tmp_path / 'stacks_0.txt').exists()
