"""Back-ends that fail, for real, and come back: training hears of it and never waits."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.metrics import MetricsWriter, check_wandb
from tests import tiny
from tests.tiny import ROOT

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def run(tmp_path):
  return RunDirectory(tmp_path / 'run')


@pytest.fixture
def writer(run):
  """writer(**options), closed at the end; a retry comes soon."""
  with contextlib.ExitStack() as stack:

    def make(**options):
      one = MetricsWriter(run, True, **{'retry_seconds': 0.05, **options})
      stack.callback(one.close, 5.0)
      return one

    yield make


def _wait(condition):
  end = time.time() + 10
  while not condition():
    assert time.time() < end
    time.sleep(0.01)


def _steps(run):
  return [json.loads(line)['step'] for line in run.metrics.read_text().splitlines()]


def _events(run):
  """(step, name) of every event, read with TensorBoard's framing, from whole files and torn."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted(run.tensorboard.glob('events.*')):
    data = path.read_bytes()
    while len(data) >= 12:
      size = int.from_bytes(data[:8], 'little')
      if len(data) < size + 16:
        break
      event = Event.FromString(data[12 : 12 + size])
      found += [(event.step, value.tag) for value in event.summary.value]
      data = data[size + 16 :]
  return found


@contextlib.contextmanager
def _file_size_limit(size):
  """No file may grow beyond it, as on a disk that is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_numbers_and_images_reach_the_file_and_tensorboard(run, writer):
  one = writer()
  one.write('train', 1, {'loss': 0.5, 'bins': [1.0, float('nan')], 'none': None})
  one.write('train', 2, {'loss': float('inf')})
  one.image('samples', 2, IMAGE)
  one.flush()
  lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
  assert lines == [
    {'kind': 'train', 'step': 1, 'loss': 0.5, 'bins': [1.0, None], 'none': None},
    {'kind': 'train', 'step': 2, 'loss': None},
  ]
  assert _events(run) == [(1, 'train/loss'), (2, 'samples')]
  assert one.errors == []


def test_other_processes_write_nothing(run):
  one = MetricsWriter(run, False)
  one.write('train', 1, {'loss': 0.5})
  one.image('samples', 1, IMAGE)
  one.flush()
  one.close()
  assert not run.path.exists() and one.errors == []


def test_a_full_disk_is_reported_and_nothing_is_lost_when_it_has_room_again(run, writer, capsys):
  one = writer()
  one.write('train', 0, {'loss': 1.0})
  one.flush()
  with _file_size_limit(run.metrics.stat().st_size + 10):
    for step in range(1, 50):
      one.write('train', step, {'loss': 1.0})
    one.image('samples', 50, IMAGE)
    one.flush()
    _wait(lambda: len(one.errors) == 2)
    assert all('too large' in error for error in one.errors), one.errors
  _wait(lambda: one.errors == [])
  one.flush()
  assert _steps(run) == list(range(50))  # Nor is there half a line.
  assert set(_events(run)) == {(step, 'train/loss') for step in range(50)} | {(50, 'samples')}
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 4 and sum('switched off' in line for line in err) == 2, err
  assert sum('is back' in line for line in err) == 2


def test_no_space_left(run, writer):
  """/dev/full refuses every byte; until the link is gone."""
  run.path.mkdir()
  run.metrics.symlink_to('/dev/full')
  one = writer()
  one.write('train', 1, {'loss': 1.0})
  one.flush()
  assert one.errors == ['metrics.jsonl: [Errno 28] No space left on device']
  run.metrics.unlink()
  _wait(lambda: one.errors == [])
  assert _steps(run) == [1]


def test_a_deleted_directory(run, writer):
  one = writer(retry_seconds=0.2)
  one.write('train', 1, {'loss': 1.0})
  one.flush()
  shutil.rmtree(run.path)
  one.write('train', 2, {'loss': 1.0})
  one.flush()
  assert len(one.errors) == 2
  _wait(lambda: one.errors == [])
  assert _steps(run) == [2]
  assert _events(run) == [(2, 'train/loss')]


def test_a_file_where_the_folder_belongs(run, writer):
  run.path.mkdir()
  run.tensorboard.write_text('')
  one = writer()
  one.write('train', 1, {'loss': 1.0})
  one.flush()
  error, = one.errors
  assert error.startswith('tensorboard: ') and _steps(run) == [1]


def test_a_blocked_back_end_blocks_nobody(run, writer, capsys):
  """A pipe that nobody reads stops whoever opens it, for ever."""
  run.path.mkdir()
  os.mkfifo(run.metrics)
  one = writer()
  start = time.monotonic()
  for step in range(20_000):
    one.write('train', step, {'loss': 1.0})
  for step in range(20):
    one.image('samples', step, IMAGE)
  assert time.monotonic() - start < 2
  assert any(error.startswith('metrics.jsonl: ') and 'lost' in error for error in one.errors)
  start = time.monotonic()
  one.flush(0.1)
  one.close(0.3)
  assert time.monotonic() - start < 2
  assert 'metrics.jsonl did not finish within 0.3 s' in capsys.readouterr().err


def test_a_torn_line_is_cut_off(run, writer):
  run.path.mkdir()
  run.metrics.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
  one = writer()
  one.write('train', 2, {'loss': 1.0})
  one.flush()
  assert _steps(run) == [1, 2]


def test_closing_writes_what_is_left_although_a_retry_is_far_off(run):
  run.path.mkdir()
  run.metrics.symlink_to('/dev/full')
  one = MetricsWriter(run, True, retry_seconds=1e6)
  one.write('train', 1, {'loss': 1.0})
  one.flush()
  assert len(one.errors) == 1
  run.metrics.unlink()
  one.write('train', 2, {'loss': 1.0})
  one.close()
  assert _steps(run) == [1, 2]


def test_wandb_that_is_not_there(monkeypatch, tmp_path, fails):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='wandb cannot be imported'):
    check_wandb('project')
  check_wandb('')
  message = fails('train', '--config', 'configs/toy/edm.py', '--workdir', tmp_path / 'run',
                  '--config.loop.wandb_project=mine')
  assert "pip install 'diffusion_jax[wandb]'" in message and not (tmp_path / 'run').exists()


def test_tensorboard_that_is_not_there(monkeypatch, run, writer, capsys):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  one = writer()
  one.write('train', 1, {'loss': 1.0})
  one.flush()
  assert _steps(run) == [1] and not run.tensorboard.exists() and one.errors == []
  assert capsys.readouterr().err == (
    'metrics: TensorBoard events are not written; for them, pip install tensorboardX.\n'
  )


def test_a_run_does_not_import_pytorch_for_tensorboard(tmp_path):
  """It takes seconds and 300 MB; whoever wants it afterwards gets it."""
  code = (
    'import importlib.util, pathlib, sys\n'
    'from diffusion_jax.runs.metrics import tensorboard\n'
    'assert importlib.util.find_spec("torch")\n'
    'with tensorboard(pathlib.Path(sys.argv[1]))():\n'
    '  pass\n'
    'assert "torch" not in sys.modules and importlib.util.find_spec("torch")\n'
  )
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                        cwd=ROOT, timeout=100)
  assert done.returncode == 0, done.stderr
  assert len(list(tmp_path.glob('events.*'))) == 1


WANDB = """
import os, signal, subprocess, sys, time
import numpy as np
from diffusion_jax.runs.metrics import MetricsWriter
from diffusion_jax.runs.directory import RunDirectory

run = RunDirectory(sys.argv[1])
run.path.mkdir(exist_ok=True)
writer = MetricsWriter(run, True, wandb_project='p', config={'a': 1}, retry_seconds=0.5)
writer.write('train', 1, {'loss': 1.0})
writer.image('samples', 1, np.zeros((4, 4, 3), np.uint8))
writer.flush(60)
print('first', writer.errors)
if sys.argv[2] == 'kill':
  children = subprocess.run(['ps', '-o', 'pid=,args=', '--ppid', str(os.getpid())],
                            capture_output=True, text=True).stdout.splitlines()
  service, = [int(line.split()[0]) for line in children if 'wandb' in line]
  os.kill(service, signal.SIGKILL)
  time.sleep(0.5)
for step in range(2, 50):
  writer.write('train', step, {'loss': 1.0})
writer.flush(60)
print('then', writer.errors)
end = time.monotonic() + 20
while sys.argv[2] == 'kill' and writer.errors and time.monotonic() < end:
  time.sleep(0.1)
print('later', writer.errors)
start = time.monotonic()
writer.close(20)
print('closed', time.monotonic() - start < 19)
if sys.argv[2] == 'offline':  # Another start of the same run, whose folder is named by the second.
  time.sleep(1)
  writer = MetricsWriter(run, True, wandb_project='p')
  writer.write('train', 50, {'loss': 1.0})
  writer.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize('how', ['offline', 'kill', 'no key'])
def test_wandb_for_real(tmp_path, how):
  """A whole process, without a network: what a run leaves, and a service that is shot."""
  pytest.importorskip('wandb')
  env = {**os.environ, 'WANDB_MODE': 'online' if how == 'no key' else 'offline',
         'HOME': str(tmp_path), 'WANDB_BASE_URL': 'http://127.0.0.1:9'}
  env.pop('WANDB_API_KEY', None)
  run = tmp_path / 'run'
  done = subprocess.run(
    [sys.executable, '-c', WANDB, str(run), how], env=env, cwd=ROOT, text=True,
    capture_output=True, timeout=120,
  )
  assert done.returncode == 0, done.stderr
  first, then, later, closed = done.stdout.splitlines()
  assert closed == 'closed True'
  assert sorted(tiny.metrics(run)) == list(range(1, 51 if how == 'offline' else 50))
  if how == 'no key':
    assert 'no API key' in first and 'no API key' in later
    assert done.stderr.count('metrics: wandb is switched off') == 1
    return
  assert (first, later) == ('first []', 'later []'), done.stderr
  if how == 'kill':
    assert "then ['wandb: " in then and 'metrics: wandb is back' in done.stderr
  else:
    name = (run / 'wandb_run_id').read_text().strip()
    files = list((run / 'wandb').glob(f'offline-run-*-{name}/run-{name}.wandb'))
    assert len(files) == 2 and done.stderr == ''
