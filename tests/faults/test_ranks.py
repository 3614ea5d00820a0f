"""Real processes, real signals: one run on several of them stops, goes on, and ends truthfully."""

import json
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.faults.ranks import Ranks

SAME = ('loss', 'gradient_norm')
STEPS, EVALUATION = 180, 70
LOOP = {'total_steps': STEPS, 'evaluate_every_steps': EVALUATION}
# On a quiet machine a step takes some milliseconds, and a stop some tenths of a second.


def _weights(run):
  return load_file(run / 'model' / 'diffusion_pytorch_model.safetensors')


def _status(run):
  return json.loads((run / 'status.json').read_text())


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Workdir of two processes with two devices each that nobody disturbed."""
  run = tmp_path_factory.mktemp('two') / 'run'
  with Ranks(run, 2, devices=2, loop=LOOP) as ranks:
    assert ranks.codes() == [0, 0]
  return run


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'devices', 'steps'), [(1, 4, STEPS), (4, 1, EVALUATION)])
def test_two_and_four_processes_agree_with_one(two, tmp_path, count, devices, steps):
  run = tmp_path / 'run'
  with Ranks(run, count, devices, loop=LOOP | {'total_steps': steps}) as ranks:
    assert ranks.codes() == [0] * count
  found, wanted = tiny.metrics(run), tiny.metrics(two)
  assert sorted(found) == list(range(1, steps + 1)) and sorted(wanted) == list(range(1, STEPS + 1))
  for step, line in found.items():
    for name in SAME:
      # Rounding grows over hundreds of steps.
      assert line[name] == pytest.approx(wanted[step][name], rel=1e-5 * step + 1e-5), (step, name)
  lines = [tiny.metrics(r, 'evaluation')[EVALUATION] for r in (run, two)]
  assert lines[0]['energy_distance'] == pytest.approx(lines[1]['energy_distance'], rel=1e-3)
  if steps == STEPS:
    for name, value in _weights(two).items():
      np.testing.assert_allclose(_weights(run)[name], value, atol=1e-4)
    scores = [json.loads((r / 'scores.json').read_text()) for r in (run, two)]
    distances = [score['generated']['energy_distance'] for score in scores]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)


@pytest.mark.slow
def test_one_of_two_is_stopped_while_compiling_training_and_evaluating(two, tmp_path):
  """Four starts of one run. Both processes save the same step, and nothing differs in the end."""
  run = tmp_path / 'run'
  stops = (('compiling', 0, 0), ('evaluating', EVALUATION, 1), ('training', EVALUATION + 2, 1))
  for state, step, rank in stops:
    with Ranks(run, 2, devices=2, loop=LOOP) as ranks:
      ranks.wait_for(state, step=step)
      ranks.signal(rank)
      assert ranks.codes() == [143, 143], state
    status = _status(run)
    assert (status['state'], status['retry']) == ('interrupted', True)
    assert status['step'] >= step and f'saved step {status["step"]}' in status['message']
    saved = sorted(int(p.name) for p in (run / 'checkpoints').iterdir() if p.name.isdigit())
    assert saved[-1] == status['step']
    if state != 'training':
      assert status['step'] == step
  with Ranks(run, 2, devices=2, loop=LOOP) as ranks:
    assert ranks.codes() == [0, 0]
  found, wanted = tiny.metrics(run), tiny.metrics(two)
  assert sorted(found) == sorted(wanted)
  for step, line in wanted.items():
    assert {k: found[step][k] for k in SAME} == {k: line[k] for k in SAME}, step
  for name, value in _weights(two).items():
    np.testing.assert_array_equal(_weights(run)[name], value)
  # An evaluation that was cut off is made up for.
  lines = [tiny.metrics(r, 'evaluation')[EVALUATION] for r in (run, two)]
  assert lines[0]['energy_distance'] == lines[1]['energy_distance']


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1], ids=['coordinator', 'peer'])
def test_a_killed_process_is_noticed_by_the_other_within_the_bound(tmp_path, victim):
  run = tmp_path / 'run'
  changes = {'loop': {'total_steps': 1_000_000, 'log_every_steps': 10,
                      'checkpoint_every_steps': 50}}
  with Ranks(run, 2, **changes) as ranks:
    ranks.wait_for('training', step=60)
    while not (run / 'checkpoints' / '50').is_dir():  # Saved in the background.
      time.sleep(0.01)
    killed = time.monotonic()
    ranks.signal(victim, signal.SIGKILL)
    code = ranks.processes[1 - victim].wait(30)
    # The timeout of 5 s, and some more for a busy machine.
    assert time.monotonic() - killed < 20
    time.sleep(0.5)  # The keepers write their last word.
    codes = ranks.codes()
  assert codes[victim] == -signal.SIGKILL and code == codes[1 - victim] != 0
  status = _status(run)
  assert status['retry'] is True and 0 < status['step'] < 1_000_000
  if victim == 1:
    assert code == 75 and status['state'] == 'peer_lost'
    assert 'process 1 of 2 is gone' in status['message']
  else:  # JAX's runtime aborts what is left, so only the keepers can tell.
    assert status['state'] in ('killed', 'peer_lost') and 'process' in status['message']
    return
  # What is left is enough to go on, here with one process of two devices in place of two.
  with Ranks(run, 1, devices=2, **changes) as ranks:
    ranks.wait_for('training')
    ranks.signal(0)
    assert ranks.codes() == [143]
  assert _status(run)['step'] >= 50
