"""The moving average against its closed form.

Averages of other lengths against those that were tracked all along.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train import ema
from diffusion_jax.train.ema import Snapshot, combine, log_decays, profile


def test_average_is_the_closed_form():
  """ema_n = sum_k (1 - d_k) prod_{i > k} d_i p_k, with the ramp (1 + i) / (10 + i) early on."""
  values = np.random.default_rng(0).normal(size=(60, 5))
  decay = 0.5 ** (8 / 20)
  average = {'w': jnp.asarray(values[0], jnp.float32)}
  for step, value in enumerate(values[1:]):
    factor = ema.decay_per_step(20, 8, jnp.asarray(step))
    average = ema.update(average, {'w': jnp.asarray(value, jnp.float32)}, factor)
  decays = [min(decay, (1 + i) / (10 + i)) for i in range(59)]
  assert decays[0] == 0.1 and decays[-1] == decay
  wanted = np.prod(decays) * values[0]
  for k in range(59):
    wanted += (1 - decays[k]) * np.prod(decays[k + 1 :]) * values[k + 1]
  np.testing.assert_allclose(average['w'], wanted, rtol=1e-5)


def test_the_halflife_halves():
  """After the ramp an old weight's share is 1/2 after ema_halflife_images images."""
  average = {'w': jnp.ones(1)}
  for _ in range(1000 // 8):
    average = ema.update(average, {'w': jnp.zeros(1)}, ema.decay_per_step(1000, 8, 10**6))
  np.testing.assert_allclose(average['w'], 0.5, rtol=1e-4)


def test_the_average_is_kept_in_float32():
  average = ema.update({'w': jnp.ones(1)}, {'w': jnp.zeros(1, jnp.bfloat16)}, jnp.float32(0.999))
  assert average['w'].dtype == jnp.float32
  np.testing.assert_allclose(average['w'], 0.999, rtol=1e-6)


BATCH, STEPS, OWN = 8, 2000, 200.0


@pytest.fixture(scope='module')
def walk():
  """Parameters after every update: a random walk, whose averages of different length differ."""
  return np.cumsum(np.random.default_rng(0).normal(size=(STEPS + 1, 3)), axis=0)


def _tracked(walk, snapshot):
  average = walk[0]
  for step in range(snapshot.step):
    decay = min(0.5 ** (BATCH / snapshot.halflife_images), (1 + step) / (10 + step))
    average = decay * average + (1 - decay) * walk[step + 1]
  return average


def _stored(walk, snapshot):
  return _tracked(walk, snapshot) if snapshot.halflife_images else walk[snapshot.step]


def _weights(snapshot):
  logs = log_decays(snapshot.halflife_images, snapshot.step, BATCH)
  return profile(snapshot, logs, np.arange(snapshot.step + 1))


@pytest.mark.parametrize('halflife', [20.0, 200.0, 50_000.0])
def test_a_profile_is_what_tracking_does(walk, halflife, monkeypatch):
  monkeypatch.setattr(ema, 'BLOCK', 300)
  snapshot = Snapshot(STEPS, halflife)
  weights = _weights(snapshot)
  assert weights.sum() == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose(weights @ walk, _tracked(walk, snapshot), rtol=1e-10)


@pytest.mark.parametrize(('halflife', 'most'), [(150.0, 0.2), (400.0, 0.1), (1000.0, 0.15)])
def test_other_lengths_come_out_of_the_checkpoints_that_are_kept(walk, halflife, most):
  stored = [Snapshot(s, h) for s in range(20, STEPS + 1, 20) for h in (0.0, OWN)]
  wanted = Snapshot(STEPS, halflife)
  found = combine(wanted, stored, BATCH)
  assert found.factors.sum() == pytest.approx(1, abs=1e-9)
  # The error that is told is that of the profile, which it can be checked against.
  made = sum(
    factor * np.pad(_weights(s), (0, STEPS - s.step))
    for factor, s in zip(found.factors, stored, strict=True)
  )
  target = _weights(wanted)
  error = np.linalg.norm(made - target) / np.linalg.norm(target)
  assert found.error == pytest.approx(error, rel=1e-3) and 1e-6 < error < most
  average = sum(f * _stored(walk, s) for f, s in zip(found.factors, stored, strict=True))
  true = _tracked(walk, wanted)
  apart = np.linalg.norm(_tracked(walk, Snapshot(STEPS, OWN)) - true)
  assert np.linalg.norm(average - true) < 0.05 * apart


def test_a_length_that_is_stored_is_found_again_and_few_snapshots_say_how_far_off_they_are():
  stored = [Snapshot(STEPS, OWN), Snapshot(STEPS, 0.0)]
  found = combine(Snapshot(STEPS, OWN), stored, BATCH)
  np.testing.assert_allclose(found.factors, [1, 0], atol=1e-9)
  assert found.error < 1e-6
  assert combine(Snapshot(STEPS, 20_000.0), stored, BATCH).error > 0.3
