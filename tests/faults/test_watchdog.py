"""Real processes that hang in the ways that processes do, and what they leave behind."""

import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT

SCRIPT = """
import ctypes, pathlib, sys, threading, time
import diffusion_jax.train.health as module

folder = pathlib.Path(sys.argv[1])

def on_stall(message):
  (folder.parent / 'status').write_text(message)
  print('last words')  # Left in a buffer, unless it is flushed.

def the_queue_that_never_fills():
  threading.Event().wait()

def lock_held():
  ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter lock.

def lock_free():
  ctypes.CDLL(None).sleep(60)

module.GRACE_SECONDS = 1.0
watchdog = module.Watchdog({seconds}, directory=folder, on_stall=on_stall, exit_code=75)
watchdog.heartbeat()
{body}
watchdog.close()
print('left')
"""
QUEUE = 'the_queue_that_never_fills()'


def _run(folder, body, seconds=0.5):
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT.replace('{seconds}', str(seconds)).replace('{body}', body),
     str(folder)],
    cwd=ROOT, capture_output=True, text=True, timeout=60,
  )
  return done, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(('body', 'where', 'what'), [
  (QUEUE, 'the_queue_that_never_fills', 'step'),
  ('lock_free()', 'lock_free', 'step'),
  (f"with watchdog.allow(0.8, 'compilation'):\n  {QUEUE}", 'the_queue_that_never_fills',
   'compilation'),
])
def test_a_stall_ends_the_process_with_its_stacks(tmp_path, body, where, what):
  done, seconds = _run(tmp_path / 'run', body)
  assert done.returncode == 75 and seconds < 20
  assert done.stdout == 'last words\n'
  stacks = (tmp_path / 'run' / 'stacks_0.txt').read_text()
  for text in (stacks, done.stderr):
    assert f'in {where}' in text and 'in _watch' in text, text
  message = (tmp_path / 'status').read_text()
  assert message.startswith(f'no {what} has been finished for') and 'stacks_0.txt' in message


@pytest.mark.slow
def test_a_data_source_that_blocks(tmp_path):
  """The dump shows the thread that reads, too."""
  body = """
with watchdog.allow(60, 'import'):
  from diffusion_jax.data.loader import Loader
  class Blocked:
    def __len__(self):
      return 8
    def __getitem__(self, index):
      the_queue_that_never_fills()
  loader = Loader(Blocked(), batch_size=2, seed=0)
next(loader)
"""
  done, _ = _run(tmp_path / 'run', body)
  assert done.returncode == 75
  stacks = (tmp_path / 'run' / 'stacks_0.txt').read_text()
  assert 'in the_queue_that_never_fills' in stacks and 'in __next__' in stacks


@pytest.mark.slow
def test_code_that_holds_the_interpreter_lock(tmp_path):
  """After a beat or two, so that the timer that needs no interpreter is set."""
  body = 'for _ in range(15): watchdog.heartbeat(); time.sleep(0.1)\nlock_held()'
  done, seconds = _run(tmp_path / 'run', body)
  assert done.returncode == 1 and seconds < 20 and done.stdout == ''
  assert 'in lock_held' in (tmp_path / 'run' / 'stacks_0.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('body', [
  f'watchdog._on_stall = lambda message: lock_free()\n{QUEUE}',
  f'watchdog._on_stall = lambda message: 1 / 0\n{QUEUE}',
])
def test_last_words_that_hang_or_fail_hold_nobody(tmp_path, body):
  done, seconds = _run(tmp_path / 'run', body)
  assert done.returncode in (1, 75) and seconds < 20
  assert 'in the_queue_that_never_fills' in done.stderr


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path):
  """The stacks go to stderr all the same, and the process ends."""
  (tmp_path / 'run').write_text('a file')
  done, seconds = _run(tmp_path / 'run', QUEUE)
  assert done.returncode == 75 and seconds < 20
  assert 'in the_queue_that_never_fills' in done.stderr and (tmp_path / 'status').exists()


@pytest.mark.slow
@pytest.mark.parametrize(('body', 'seconds'), [
  ('for _ in range(12): watchdog.heartbeat(); time.sleep(0.1)', 0.5),
  ("with watchdog.allow(30, 'save'): time.sleep(2)", 0.5),
  ("with watchdog.allow(0, 'save'): time.sleep(2)", 0.5),
  ("with watchdog.allow(30, 'save'): ctypes.PyDLL(None).usleep(4000000)", 0.5),
  ('import shutil; time.sleep(1.3); shutil.rmtree(folder)', 5),
  ('time.sleep(1.5)', 0),
])
def test_who_gets_on_is_left_alone(tmp_path, body, seconds):
  done, _ = _run(tmp_path / 'run', body, seconds)
  assert (done.returncode, done.stdout, done.stderr) == (0, 'left\n', '')
  assert not list(tmp_path.glob('run/*'))
