"""Time samplings against their distribution functions, without drawing; importance by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.diffusion import objective
from diffusion_jax.diffusion.noise import timestep
from diffusion_jax.diffusion.objective import LossHistory

U = np.linspace(0.001, 0.999, 101)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def test_stratified_times_are_evenly_spaced_on_the_circle():
  for seed in range(3):
    u = np.sort(objective.stratified(jax.random.key(seed), 7))
    gaps = np.diff(np.append(u, u[0] + 1))
    np.testing.assert_allclose(gaps, 1 / 7, rtol=1e-12)
    assert 0 <= u[0] < u[-1] < 1
  first = [objective.stratified(jax.random.key(seed), 7)[0] for seed in range(400)]
  assert stats.kstest(first, 'uniform').pvalue > 0.01


def test_uniform_times_are_independent():
  u = objective.uniform(jax.random.key(0), 2000)
  assert stats.kstest(np.asarray(u), 'uniform').pvalue > 0.01
  assert np.diff(np.sort(u)).max() > 2 / 2000  # Not stratified.


def test_logit_normal_has_its_distribution():
  for mean, std in ((0.0, 1.0), (-0.6, 1.4)):
    t = np.asarray(objective.logit_normal(jnp.asarray(U), mean, std))
    np.testing.assert_allclose(stats.norm.cdf((np.log(t / (1 - t)) - mean) / std), U, rtol=1e-9)


def test_log_normal_has_its_distribution():
  sigma = np.asarray(objective.log_normal(jnp.asarray(U)))
  np.testing.assert_allclose(stats.norm.cdf((np.log(sigma) + 1.2) / 1.2), U, rtol=1e-9)
  np.testing.assert_allclose(objective.log_normal(jnp.asarray(0.5)), np.exp(-1.2), rtol=1e-12)


@pytest.mark.parametrize('scale', [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_has_its_distribution(scale):
  """t = f(u') of a uniform u' (Esser et al. 2024, eq. 20), f falling, so that t grows with u."""
  f = lambda u: 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
  t = objective.mode(jnp.asarray(U), scale)
  np.testing.assert_allclose(t, f(1 - U), rtol=1e-12, atol=1e-15)
  assert (np.diff(t) > 0).all()
  density = lambda u: 1 / jax.grad(lambda u: objective.mode(u, scale))(jnp.asarray(u))
  if scale > -1:
    np.testing.assert_allclose(density(0.5), 1 / (1 - scale * (np.pi / 2 - 1)), rtol=1e-9)
    np.testing.assert_allclose(density(0.0), 1 / (1 + scale), rtol=1e-9)


@pytest.mark.parametrize(
  'quantile', [objective.logit_normal, objective.mode, objective.log_normal]
)
def test_both_ends_are_finite(quantile):
  for dtype in (jnp.float32, jnp.float64):
    found = quantile(jnp.array([0.0, 1.0], dtype))
    assert found.dtype == dtype and np.isfinite(found).all()


def test_times_become_timesteps():
  u = jnp.array([0.0, 0.0999, 0.1, 0.999999, 1.0])
  np.testing.assert_array_equal(timestep(u, 10), [0, 0, 1, 9, 9])
  drawn = timestep(objective.stratified(jax.random.key(3), 50), 10)
  np.testing.assert_array_equal(np.bincount(drawn), [5] * 10)


def test_history_keeps_the_last_losses_of_each_timestep():
  history = objective.init_history(3, 2)
  update = jax.jit(objective.update_history)
  history = update(history, jnp.array([1, 1, 2]), jnp.array([5.0, 6.0, 7.0]))
  np.testing.assert_array_equal(history.losses, [[0, 0], [5, 6], [7, 0]])
  np.testing.assert_array_equal(history.count, [0, 2, 1])
  history = update(history, jnp.array([1, 0, 1]), jnp.array([8.0, 1.0, 9.0]))
  np.testing.assert_array_equal(history.losses, [[1, 0], [8, 9], [7, 0]])
  np.testing.assert_array_equal(history.count, [1, 2, 1])


def test_importance_is_the_root_mean_square_loss_once_the_history_is_full():
  losses = jnp.array([[3.0, 4.0], [0.0, 0.0], [1.0, 7.0]])
  root = np.sqrt([12.5, 0, 25])
  found = objective.importance(LossHistory(losses, jnp.array([2, 2, 2])), 0.01)
  np.testing.assert_allclose(found, 0.99 * root / root.sum() + 0.01 / 3, rtol=1e-12)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
  early = objective.importance(LossHistory(losses, jnp.array([2, 2, 1])), 0.01)
  np.testing.assert_allclose(early, 1 / 3, rtol=1e-12)
  no_loss = objective.importance(LossHistory(0 * losses, jnp.array([2, 2, 2])), 0.01)
  np.testing.assert_allclose(no_loss, 1 / 3, rtol=1e-12)


def test_importance_sampling_is_unbiased():
  """Over a fine grid of u, timesteps come in their shares, and weights restore the plain mean."""
  probability, loss = jnp.array([0.1, 0.45, 0.05, 0.4]), jnp.array([3.0, -1.0, 10.0, 0.5])
  t, weight = objective.by_importance((jnp.arange(1000) + 0.5) / 1000, probability)
  np.testing.assert_array_equal(np.bincount(t), [100, 450, 50, 400])
  np.testing.assert_allclose((weight * loss[t]).mean(), loss.mean(), rtol=1e-12)
  ends, _ = objective.by_importance(jnp.array([0.0, 1.0]), probability)
  np.testing.assert_array_equal(ends, [0, 3])
