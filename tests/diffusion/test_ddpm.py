"""Algorithms 1 and 2 of DDPM (Ho, Jain & Abbeel 2020) as they are written there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp

from diffusion_jax.diffusion.bounds import transition
from diffusion_jax.diffusion.losses import add_noise
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import NoiseConfig, Schedule
from diffusion_jax.diffusion.objective import Objective, ObjectiveConfig
from diffusion_jax.diffusion.samplers import sampler, sampling_grid

BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULE = Schedule(NoiseConfig('linear', 1e-4, 0.02))


def test_noising_step_by_step_has_the_moments_of_the_one_jump():
  """E x_t and Var x_t given x_0, by the recursion of q(x_t | x_{t-1}), at every step."""
  mean, variance = 1.0, 0.0
  for t, beta in enumerate(BETAS):
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    np.testing.assert_allclose(mean, SCHEDULE.alphas[t], rtol=1e-10)
    np.testing.assert_allclose(variance, SCHEDULE.sigmas[t] ** 2, rtol=1e-8)
  with jax.enable_x64(True):
    levels = [(SCHEDULE.alphas[i], SCHEDULE.sigmas[i]) for i in (slice(1, None), slice(None, -1))]
    kept, added = transition(*(tuple(map(jnp.asarray, level)) for level in levels))
  np.testing.assert_allclose(kept, np.sqrt(1 - BETAS[1:]), rtol=1e-9)
  np.testing.assert_allclose(added, BETAS[1:], rtol=1e-6)


@pytest.mark.parametrize('stop', [30, 400])
def test_noising_step_by_step_is_the_one_jump_in_distribution(stop):
  """Of data far from Gaussian: samples of both, which no test tells apart."""
  data = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.array([1e-4, 0.04]))
  keys = jax.random.split(jax.random.key(0), 4)
  x, other = data.sample(keys[0], 4000), data.sample(keys[1], 4000)

  @jax.jit
  def walk(x):
    def step(x, item):
      beta, key = item
      return jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * jax.random.normal(key, x.shape), None

    items = jnp.asarray(BETAS[:stop], x.dtype), jax.random.split(keys[2], stop)
    return jax.lax.scan(step, x, items)[0]

  level = np.float32(SCHEDULE.alphas[stop - 1]), np.float32(SCHEDULE.sigmas[stop - 1])
  jumped = add_noise(other, jax.random.normal(keys[3], other.shape), *level)
  assert ks_2samp(np.ravel(walk(x)), np.ravel(jumped)).pvalue > 0.01
  assert ks_2samp(np.ravel(x), np.ravel(jumped)).pvalue < 1e-3


def test_algorithm_1():
  """|eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t)|^2 at one uniform t each."""
  seen = []

  def network(x, t):
    seen.append((x, t))
    return jnp.sin(x) * t.reshape(-1, 1)

  x0, key = jax.random.normal(jax.random.key(1), (500, 3)), jax.random.key(2)
  losses = Objective(ObjectiveConfig('epsilon'), SCHEDULE).losses(network, x0, key)
  (x, t), = seen
  alpha_bar = np.cumprod(1 - BETAS)[np.asarray(t)][:, None]
  eps = (np.asarray(x, np.float64) - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
  assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.05
  wanted = ((eps - np.sin(x) * np.asarray(t)[:, None]) ** 2).mean(axis=1)
  np.testing.assert_allclose(losses.loss, wanted, rtol=1e-2)
  assert np.array_equal(t, np.round(t)) and t.min() >= 0 and t.max() <= 999
  counts = np.histogram(t, 5, (0, 1000))[0]
  assert (np.abs(counts - 100) < 40).all()


@pytest.mark.parametrize('name', ['ddpm', 'ddpm_large'])
def test_algorithm_2(name):
  """All 1000 steps by the paper's formula, its noise given; none in the last step."""
  noises = np.random.default_rng(0).normal(size=(1000, 2, 3))
  x = start = np.random.default_rng(1).normal(size=(2, 3))
  network = lambda x, t: 0.3 * np.tanh(x) * (1 + t / 1000)
  alpha_bar = np.cumprod(1 - BETAS)
  for i, t in enumerate(range(999, -1, -1)):
    before = alpha_bar[t - 1] if t else 1.0
    large = BETAS[t] if t else 0.0
    variance = large if name == 'ddpm_large' else (1 - before) / (1 - alpha_bar[t]) * BETAS[t]
    mean = (x - BETAS[t] / np.sqrt(1 - alpha_bar[t]) * network(x, t)) / np.sqrt(1 - BETAS[t])
    x = mean + np.sqrt(variance) * noises[i]

  def denoise(x, alpha, sigma):
    eps = 0.3 * jnp.tanh(x) * (1 + SCHEDULE.label(alpha, sigma) / 1000)
    return (x - sigma * eps) / alpha

  with jax.enable_x64(True):
    grid, drawn = sampling_grid(SCHEDULE, 1000), jnp.asarray(noises)
    draw = jax.jit(lambda noise: sampler(name)(
      denoise, jnp.asarray(start), grid, lambda i, like: noise[i]
    ))
    found = draw(drawn)
    np.testing.assert_allclose(found, x, rtol=1e-6)
    np.testing.assert_array_equal(draw(drawn.at[-1].add(5.0)), found)
    assert (jnp.abs(draw(drawn.at[-2].add(5.0)) - found) > 1e-3).all()
