"""A step that is not finite, or a spike, leaves everything that is trained as it was."""

import jax
import numpy as np
import pytest

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from diffusion_jax.train.guard import SETTLED, GuardConfig
from diffusion_jax.train.optimizer import OptimizerConfig, make_optimizer
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from tests.regression import Regression, regression_batch

BATCH = 16
DEFAULT = GuardConfig()
GOOD, NAN, SPIKE = 'good', 'nan', 'spike'


def _batch(kind, index):
  batch = regression_batch(BATCH, seed=index)
  if kind == NAN:
    batch['x'][3, 2] = np.nan  # One number of one example.
  elif kind == SPIKE:
    batch['y'] *= 100
  return {name: x.astype(np.float32) for name, x in batch.items()}


def _start(guard, accumulation=1):
  """(step function, fresh state, mesh)."""
  task, mesh = Regression(), make_mesh(MeshConfig(), jax.devices()[:1])
  optimizer = make_optimizer(
    OptimizerConfig(learning_rate=1e-2), jax.eval_shape(task.initialize, jax.random.key(0)), 10,
    'cpu',
  )
  abstract = abstract_state(task, optimizer, True, mesh)
  step = make_step(
    task, optimizer, abstract, batch_size=BATCH, ema_halflife_images=100.0,
    accumulation=accumulation, guard=guard,
  )
  return step, initializer(task, optimizer, 0, abstract)(None), mesh


def _run(kinds, guard=DEFAULT, accumulation=1):
  """(states on the host, metrics) after each step; good batches are the same in every run."""
  step, state, mesh = _start(guard, accumulation)
  states, metrics, good = [jax.device_get(state)], [], 0
  for kind in kinds:
    state, out = step(state, {}, put_batch(_batch(kind, good), mesh))
    good += kind == GOOD
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(out))
  return states, metrics


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('accumulation', [1, 4])
def test_one_nan_touches_nothing_and_training_goes_on(accumulation):
  states, metrics = _run([GOOD, GOOD, NAN, GOOD], accumulation=accumulation)
  before, after = states[2], states[3]
  for name in ('params', 'opt_state', 'ema', 'carry', 'key'):
    _assert_same(getattr(before, name), getattr(after, name))
  assert int(after.step) == 3 and int(after.guard.skipped) == int(after.guard.in_a_row) == 1
  without, _ = _run([GOOD, GOOD, GOOD], accumulation=accumulation)
  _assert_same(states[4].params, without[3].params)
  _assert_same(states[4].opt_state, without[3].opt_state)
  assert int(states[4].guard.in_a_row) == 0 and int(states[4].guard.skipped) == 1
  assert metrics[2]['loss'].count == 0 and metrics[2]['skipped_fraction'].compute() == 1
  assert metrics[3]['loss'].count == BATCH and metrics[3]['skipped_fraction'].total == 0


def test_after_too_many_in_a_row_no_step_is_used_any_more():
  guard = GuardConfig(max_skipped_in_a_row=2)
  states, metrics = _run([GOOD, NAN, GOOD, NAN, NAN, GOOD, GOOD], guard)
  assert [int(m['given_up'].total) for m in metrics] == [0, 0, 0, 0, 1, 1, 1]
  for state in states[4:]:
    _assert_same(state.params, states[3].params)
  assert any((states[3].params[n] != states[2].params[n]).any() for n in states[3].params)


def test_spikes_are_skipped_where_asked_for():
  kinds = [GOOD] * (SETTLED + 5) + [SPIKE, GOOD]
  plain, _ = _run(kinds)
  assert int(plain[-1].guard.skipped) == 0
  careful, metrics = _run(kinds, GuardConfig(spike_deviations=6.0))
  assert [float(m['skipped_fraction'].total) for m in metrics] == [0.0] * (SETTLED + 5) + [1.0, 0.0]
  _assert_same(careful[-3].params, careful[-2].params)
  # Its numbers are finite, so they are still to be seen.
  assert metrics[-2]['loss'].total > 100 * metrics[-1]['loss'].total
  start, _ = _run([GOOD, SPIKE], GuardConfig(spike_deviations=6.0))
  assert int(start[-1].guard.skipped) == 0


def test_the_running_mean_and_variance_are_those_of_the_losses():
  states, metrics = _run([GOOD] * 20)
  losses = [float(m['loss'].compute()) for m in metrics]
  guard = states[-1].guard
  assert guard.mean == pytest.approx(np.mean(losses), rel=1e-4)
  assert guard.variance == pytest.approx(np.var(losses), rel=1e-3)


@pytest.mark.parametrize(('values', 'words'), [
  ({'max_skipped_in_a_row': 0}, 'safety.max_skipped_in_a_row is 0'),
  ({'spike_deviations': -1.0}, 'safety.spike_deviations is -1'),
])
def test_impossible_settings(values, words):
  with pytest.raises(UserError, match=words):
    typed(GuardConfig, values, 'config.safety.')
