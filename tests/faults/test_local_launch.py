"""launch/local.sh: two real processes that train, are stopped, are killed."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
QUICK = ['loop.log_every_steps=1', 'loop.evaluate_samples=0', 'settings.sample.steps=2', '--quiet']


@pytest.fixture
def local(tmp_path):
  """local(*arguments): launch/local.sh 2 in the background, its output in tmp_path / 'output'."""
  env = tiny.environment('', devices=1, PYTHONPATH=str(tiny.ROOT))
  started = []

  def run(*arguments):
    command = ['launch/local.sh', '2', '--config', 'configs/toy/edm.py', '--workdir']
    with (tmp_path / 'output').open('w') as output:
      started.append(subprocess.Popen(
        [*command, str(tmp_path / 'run'), *arguments], cwd=tiny.ROOT, env=env,
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
      ))
    return started[-1]

  yield run
  for process in started:
    for child in children(process):
      os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def children(process) -> list[int]:
  """The processes that train, in the order of their numbers."""
  listed = subprocess.run(
    ['ps', '-s', str(process.pid), '-o', 'pid=,args='], capture_output=True, text=True
  ).stdout.splitlines()
  return [int(line.split()[0]) for line in listed if '-m diffusion_jax train' in line]


def wait_until(what, process, seconds=120):
  end = time.monotonic() + seconds
  while not what():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.1)


def test_a_signal_reaches_all_who_save_and_leave(local, tmp_path):
  process = local('loop.total_steps=100000', *QUICK)
  metrics = tmp_path / 'run/metrics.jsonl'
  wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, process)
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=100) == 130, (tmp_path / 'output').read_text()
  lines = (tmp_path / 'output').read_text().splitlines()
  assert 'local.sh: passing SIGINT on to all' in lines
  for i in range(2):
    assert any(line.startswith(f'[{i}] process {i} of 2 (explicit: ') for line in lines)
  versions = json.loads((tmp_path / 'run/versions.json').read_text())
  assert (versions['processes'], versions['devices']) == (2, 2)
  status = json.loads((tmp_path / 'run/status.json').read_text())
  assert status['state'] == 'interrupted'
  assert re.fullmatch(r'\d+', os.listdir(tmp_path / 'run/checkpoints')[0])
  assert children(process) == []


def test_when_one_is_killed_the_others_leave(local, tmp_path):
  process = local('loop.total_steps=100000', *QUICK)
  wait_until(lambda: len(children(process)) == 2, process)
  os.kill(children(process)[1], signal.SIGKILL)
  assert process.wait(timeout=100) == 137
  assert children(process) == []
  said = 'local.sh: a process left with code 137; telling the others to leave'
  assert said in (tmp_path / 'output').read_text()
