"""The posterior against direct conditioning of the joint Gaussian, and its variances' bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.bounds import (
  learned_log_variance,
  log_variances,
  posterior,
  transition,
)
from diffusion_jax.diffusion.noise import BETAS, Schedule, ScheduleConfig
from diffusion_jax.diffusion.samplers import sampling_grid

PROCESSES = {
  'vp': processes.linear(), 've': processes.exponential(0.1, 20.0), 'flow': processes.flow(),
  'cosine': processes.cosine(), 'sub_vp': processes.sub_vp(processes.linear()),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def levels(name, t, s):
  return PROCESSES[name](jnp.asarray(t)), PROCESSES[name](jnp.asarray(s))


@pytest.mark.parametrize('t,s', [(0.6, 0.5), (0.9, 0.1), (0.31, 0.3)])
@pytest.mark.parametrize('name', PROCESSES)
def test_the_posterior_is_the_conditioned_joint(name, t, s):
  """(x_s, x_t) given x_0 has covariance [[ss, c], [c, tt]], c = alpha_{t|s} ss: condition x_s."""
  here, there = levels(name, t, s)
  (alpha_t, sigma_t), (alpha_s, sigma_s) = map(np.asarray, here), map(np.asarray, there)
  covariance = np.array([[sigma_s**2, alpha_t / alpha_s * sigma_s**2], [0, sigma_t**2]])
  covariance[1, 0] = covariance[0, 1]
  x0, x = np.array([[0.3, -1.0]]), np.array([[1.4, 0.2]])
  gain = covariance[0, 1] / covariance[1, 1]
  mean = alpha_s * x0 + gain * (x - alpha_t * x0)
  variance = 1 / np.linalg.inv(covariance)[0, 0]
  found = posterior(jnp.asarray(x), jnp.asarray(x0), here, there)
  np.testing.assert_allclose(found[0], mean, rtol=1e-9)
  np.testing.assert_allclose(found[1], variance, rtol=1e-8)


def test_ddpm_eq_6_and_7():
  betas = BETAS['linear'](1000, 1e-4, 0.02)
  alpha_bar = np.cumprod(1 - betas)
  t = np.array([1, 17, 500, 999])
  here, there = ((np.sqrt(alpha_bar[i]), np.sqrt(1 - alpha_bar[i])) for i in (t, t - 1))
  ratio, added = transition(*((map(jnp.asarray, level)) for level in (here, there)))
  np.testing.assert_allclose(ratio, np.sqrt(1 - betas[t]), rtol=1e-12)
  np.testing.assert_allclose(added, betas[t], rtol=1e-10)
  x, x0 = np.full((4, 1), 0.7), np.full((4, 1), -0.4)
  of_x0 = np.sqrt(alpha_bar[t - 1]) * betas[t] / (1 - alpha_bar[t])
  of_x = np.sqrt(1 - betas[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
  mean, variance = posterior(jnp.asarray(x), jnp.asarray(x0), here, there)
  np.testing.assert_allclose(mean[:, 0], of_x0 * -0.4 + of_x * 0.7, rtol=1e-9)
  tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * betas[t]
  np.testing.assert_allclose(variance, tilde, rtol=1e-9)


def test_two_steps_back_are_one():
  """q(x_r | x_t, x_0) is q(x_s | x_t, x_0) followed by q(x_r | x_s, x_0): means and variances."""
  process = PROCESSES['cosine']
  t, s, r = (process(jnp.asarray(v)) for v in (0.8, 0.5, 0.2))
  x, x0 = jnp.array([[1.3]]), jnp.array([[-0.2]])
  mean_s, variance_s = posterior(x, x0, t, s)
  mean_r, variance_r = posterior(mean_s, x0, s, r)
  slope = posterior(mean_s + 1, x0, s, r)[0] - mean_r
  wanted_mean, wanted_variance = posterior(x, x0, t, r)
  np.testing.assert_allclose(mean_r, wanted_mean, rtol=1e-12)
  found = variance_r + slope**2 * variance_s
  np.testing.assert_allclose(found, wanted_variance[None, None], rtol=1e-12)


def test_no_signal_and_no_noise():
  pair = lambda *values: tuple(jnp.float32(v) for v in values)
  x, x0 = jnp.full((1, 2), 1.5, jnp.float32), jnp.full((1, 2), 0.4, jnp.float32)
  from_nothing = posterior(x, x0, pair(0.0, 1.0), pair(0.6, 0.8))
  np.testing.assert_allclose(from_nothing[0], 0.6 * x0, rtol=1e-6)
  np.testing.assert_allclose(from_nothing[1], 0.64, rtol=1e-6)
  to_data = posterior(x, x0, pair(0.6, 0.8), pair(1.0, 0.0))
  np.testing.assert_allclose(to_data[0], x0, rtol=1e-6)
  assert to_data[1] == 0
  for here, there in (
    ((0.0, 1.0), (0.6, 0.8)), ((0.6, 0.8), (1.0, 0.0)), ((0.0, 1.0), (1.0, 0.0))
  ):
    both = lambda x, x0, h=here, t=there: posterior(x, x0, pair(*h), pair(*t))
    total = lambda x, x0, both=both: sum(part.sum() for part in both(x, x0))
    assert all(np.isfinite(g).all() for g in jax.grad(total, (0, 1))(x, x0))


@pytest.mark.parametrize('zero_snr', [False, True])
def test_the_bounds_of_the_log_variance(zero_snr):
  """Between them lies the best variance for data N(0, s^2), s <= 1, with equality at both ends."""
  schedule = Schedule(ScheduleConfig('linear', 1e-4, 0.02, 100, zero_snr))
  grid = sampling_grid(schedule, 100)
  lower, upper = log_variances(grid)
  assert (lower <= upper).all() and np.isfinite(lower).all() and lower[-1] == lower[-2]
  betas = 1 - schedule.alpha_bar / np.append(1, schedule.alpha_bar[:-1])
  np.testing.assert_allclose(np.exp(upper), betas[::-1], rtol=1e-9)
  alphas, sigmas = grid
  here, there = (alphas[:-2], sigmas[:-2]), (alphas[1:-1], sigmas[1:-1])
  of_x0 = posterior(jnp.zeros((99, 1)), jnp.ones((99, 1)), here, there)[0][:, 0]
  for s, bound in ((0.0, lower), (0.5, None), (1.0, upper)):
    uncertainty = s**2 * sigmas[:-2] ** 2 / (alphas[:-2] ** 2 * s**2 + sigmas[:-2] ** 2)
    best = jnp.log(jnp.exp(lower[:-1]) + of_x0**2 * uncertainty)
    if bound is None:
      assert (best > lower[:-1]).all() and (best < upper[:-1]).all()
    else:
      np.testing.assert_allclose(best, bound[:-1], rtol=1e-9, atol=1e-14)


def test_a_learned_variance_interpolates_in_log_space():
  lower, upper = jnp.array([-9.0, -5.0]), jnp.array([-8.0, -4.5])
  output = jnp.array([[-1.0, 0.0, 1.0], [-1.0, 0.5, 1.0]])
  found = learned_log_variance(output, lower, upper)
  np.testing.assert_allclose(found, [[-9, -8.5, -8], [-5, -4.625, -4.5]], rtol=1e-12)
