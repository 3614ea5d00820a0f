"""Traces hold exactly the steps of their window."""

import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.train.profiling import ProfilerWindow
from tests.tiny import ROOT


def _traced(folder):
  """Numbers of the steps that a trace tells of."""
  file, = folder.rglob('*.xplane.pb')
  return sorted({int(number) for number in re.findall(rb'mark_(\d+)_', file.read_bytes())})


def _train(window, steps, actions=None):
  step = jax.jit(lambda x: x + 1)
  x = jnp.zeros(())
  for number in range(steps):
    window.before(number)
    with jax.profiler.TraceAnnotation(f'mark_{number}_'):
      x = step(x)
    (actions or {}).get(number, lambda: None)()
  window.close()
  return float(x)


def test_a_window_of_steps(tmp_path, capfd):
  window = ProfilerWindow(tmp_path, 4, 3)
  assert _train(window, 12) == 12
  assert [path.name for path in tmp_path.iterdir()] == ['step_4']
  assert _traced(tmp_path / 'step_4') == [4, 5, 6]
  assert 'profiler: tracing 3 steps from step 4 on into' in capfd.readouterr().err


def test_a_window_that_the_end_of_the_run_cuts_off(tmp_path):
  _train(ProfilerWindow(tmp_path, 4, 100), 6)
  assert _traced(tmp_path / 'step_4') == [4, 5]


def test_without_a_first_step_nothing_is_traced_and_the_signal_is_given_back(tmp_path):
  before = signal.getsignal(signal.SIGUSR1)
  window = ProfilerWindow(tmp_path, 0, 3)
  assert signal.getsignal(signal.SIGUSR1) != before
  _train(window, 3)
  assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_that_cannot_be_started_stops_nothing(tmp_path, capfd):
  jax.profiler.start_trace(str(tmp_path / 'other'))
  try:
    assert _train(ProfilerWindow(tmp_path / 'mine', 1, 2), 5) == 5
  finally:
    jax.profiler.stop_trace()
  assert 'profiler: no trace from step 1 on (' in capfd.readouterr().err
  assert not (tmp_path / 'mine').exists()


def test_a_trace_that_cannot_be_written_stops_nothing_and_the_next_one_works(tmp_path, capfd):
  blocked = tmp_path / 'step_1'
  blocked.write_text('a file where the folder belongs')

  def again():
    assert 'profiler: the trace could not be written (' in capfd.readouterr().err
    blocked.unlink()
    signal.raise_signal(signal.SIGUSR1)

  assert _train(ProfilerWindow(tmp_path, 1, 2), 8, {4: again}) == 8
  assert _traced(tmp_path / 'step_5') == [5, 6]


SCRIPT = """
import pathlib, sys, time
import jax, jax.numpy as jnp
from diffusion_jax.train.profiling import ProfilerWindow

folder = pathlib.Path(sys.argv[1])
window = ProfilerWindow(folder, 0, 3)
step = jax.jit(lambda x: x + 1)
x = step(jnp.zeros(()))
number = after = 0
while after < 5:
  window.before(number)
  with jax.profiler.TraceAnnotation(f'mark_{number}_'):
    x = step(x)
  print(number, flush=True)
  time.sleep(0.02)
  number += 1
  after += folder.exists()
window.close()
"""


@pytest.mark.slow
def test_a_signal_traces_the_steps_that_follow(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', SCRIPT, str(tmp_path / 'profile')], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )
  try:
    while process.stdout.readline().strip() != '10':
      assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0, err
  folder, = (tmp_path / 'profile').iterdir()
  first = int(folder.name.removeprefix('step_'))
  assert first >= 10 and _traced(folder) == [first, first + 1, first + 2]
