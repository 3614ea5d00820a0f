"""Dequantisation of data whose probabilities and densities are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.dequantization import dequantize, logit_normal, uniform

LEVELS = 8
WIDTH = 2 / (LEVELS - 1)
VALUES = np.linspace(-1, 1, LEVELS)
MEAN, STD = 0.1, 0.4


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def cdf(x):
  return np.array([(1 + math.erf((v - MEAN) / STD / 2**0.5)) / 2 for v in np.ravel(x)])


def density_bits(x):
  """-log2 N(x; MEAN, STD^2), [b] from [b 1]."""
  nats = ((x[:, 0] - MEAN) / STD) ** 2 / 2 + math.log(STD * (2 * math.pi) ** 0.5)
  return np.asarray(nats / math.log(2))


MASS = cdf(VALUES + WIDTH / 2) - cdf(VALUES - WIDTH / 2)


def test_uniform_dequantisation_is_jensens_bound():
  count = 2000
  x = np.repeat(VALUES, count)[:, None]
  continuous, extra = dequantize(x, jax.random.split(jax.random.key(0), len(x)), levels=LEVELS)
  offset = np.asarray(continuous - x)
  assert (np.abs(offset) <= WIDTH / 2).all() and abs(offset.std() - WIDTH / 12**0.5) < 0.002
  np.testing.assert_allclose(extra, math.log2(3.5), rtol=1e-12)
  total = (density_bits(continuous) + extra).reshape(LEVELS, count)
  u = VALUES[:, None] + WIDTH * (np.arange(1000) / 1000 - 0.4995)
  wanted = density_bits(u.reshape(-1, 1)).reshape(LEVELS, -1).mean(axis=1) - math.log2(WIDTH)
  error = total.std(axis=1) / count**0.5
  assert (np.abs(total.mean(axis=1) - wanted) < 5 * error).all()
  assert (wanted > -np.log2(MASS)).all()


def test_the_exact_posterior_makes_the_variational_bound_tight():
  """With q(u | x) = p(x + u) / P(x), the bound is -log2 P(x) whatever u is drawn."""
  def truncated(x, keys):
    u, _ = uniform(x, keys)
    bins = jnp.stack([jnp.asarray(cdf(x - WIDTH / 2)), jnp.asarray(cdf(x + WIDTH / 2))])
    share = bins[0] + u[:, 0] * (bins[1] - bins[0])
    y = MEAN + STD * jax.scipy.special.ndtri(share)[:, None]
    log_q = math.log(WIDTH) - jnp.log(bins[1] - bins[0]) - density_bits(y) * math.log(2)
    return (y - x) / WIDTH + 0.5, log_q

  keys = jax.random.split(jax.random.key(0), LEVELS)
  x = VALUES[:, None]
  continuous, extra = dequantize(x, keys, levels=LEVELS, dequantizer=truncated)
  assert np.abs(continuous - x).max() > 0.02
  np.testing.assert_allclose(density_bits(continuous) + extra, -np.log2(MASS), rtol=1e-9)


def test_logit_normal_knows_its_density():
  mean, log_std = jnp.array([0.3, -0.5]), jnp.array([-0.2, 0.4])
  parameters = lambda x: (x * 0 + mean, x * 0 + log_std)
  u, log_q = logit_normal(parameters)(np.zeros((3, 2)), jax.random.split(jax.random.key(0), 3))
  std, logit = np.exp(log_std), np.log(u / (1 - u))
  density = np.exp(-(((logit - mean) / std) ** 2) / 2) / (std * (2 * np.pi) ** 0.5) / (u * (1 - u))
  np.testing.assert_allclose(log_q, np.log(density).sum(axis=1), rtol=1e-9)
  assert ((u > 0) & (u < 1)).all() and np.ptp(u[:, 0]) > 0
