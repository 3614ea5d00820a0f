"""Pictures decoded in other processes: the same, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.config import DataConfig
from diffusion_jax.data.decoding import Decoders
from diffusion_jax.data.sources import open_data
from diffusion_jax.errors import Unreadable, UserError


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(4):
    Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text('a')
  (tmp_path / '3.png').write_bytes(b'')
  return tmp_path


def opened(folder, **options):
  return open_data(DataConfig(f'folder:{folder}', (8, 6), test_fraction=0.0, **options))[0]


def alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def gone(pids):
  until = time.monotonic() + 20
  while any(map(alive, pids)) and time.monotonic() < until:
    time.sleep(0.05)
  return not any(map(alive, pids))


def test_records_are_those_that_threads_decode(folder, capsys):
  """Also once a process has died, with one sentence."""
  here, there = opened(folder), opened(folder, processes=2)
  for i in range(3):
    for name, value in here[i].items():
      np.testing.assert_array_equal(there[i][name], value)
  with pytest.raises(Unreadable, match=r'3\.png cannot be read') as error:
    there[3]
  assert error.value.cause == 'empty'
  assert there._call(os.getpid) != os.getpid()
  processes = list(there._call._pool._processes)
  os.kill(processes[0], signal.SIGKILL)
  for _ in range(20):
    np.testing.assert_array_equal(there[0]['image'], here[0]['image'])
  assert capsys.readouterr().err.count('has died; from now on') == 1 and gone(processes)
  with pytest.raises(UserError, match=r'data.processes has no effect on rings'):
    open_data(DataConfig('rings', 8, processes=1))


SCRIPT = """
import os, sys
from diffusion_jax.data.decoding import Decoders
if __name__ == '__main__':
  call = Decoders(1)
  print(call(os.getpid), flush=True)
  sys.stdin.read()
"""


def test_they_end_with_the_process_that_started_them(tmp_path):
  (tmp_path / 'script.py').write_text(SCRIPT)
  run = subprocess.Popen(
    [sys.executable, str(tmp_path / 'script.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  pid = int(run.stdout.readline())
  os.kill(pid, signal.SIGTERM)  # As a signal to the whole group, which the parent answers.
  time.sleep(0.2)
  assert alive(pid)
  run.kill()
  run.communicate()
  assert gone([pid])
  assert Decoders(3).__reduce__() == (Decoders, (3,))
