"""Score matching on Gaussian data, in expectation by exact quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.schedules import tabulate
from diffusion_jax.diffusion.score_matching import denoising_score_matching, sliced_score_matching
from tests.diffusion.quadrature import normal_nodes

ALPHA, SIGMA, STD = 0.8, 0.7, 1.3
VARIANCE = (ALPHA * STD) ** 2 + SIGMA**2


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def denoising(k):
  """E of denoising score matching of the score -k x on N(0, STD^2) data, by quadrature."""
  x0, eps, weights = normal_nodes(STD, 1.0)
  level = jnp.full(len(x0), ALPHA), jnp.full(len(x0), SIGMA)
  return weights @ denoising_score_matching(lambda x, a, s: -k * x, x0, eps, *level)


def sliced(k, reduce_variance):
  x, v, weights = normal_nodes(np.sqrt(VARIANCE), 1.0)
  return weights @ sliced_score_matching(lambda x: -k * x, x, v, reduce_variance)


@pytest.mark.parametrize('k', [0.0, 0.3, 1 / VARIANCE, 2.0])
def test_sliced_equals_denoising_up_to_the_constant(k):
  """Both are k^2 variance / 2 - k, plus 1 / (2 sigma^2) for denoising (over NCSN's sigma^2)."""
  closed = k**2 * VARIANCE / 2 - k
  np.testing.assert_allclose(denoising(k) / SIGMA**2, closed + 1 / (2 * SIGMA**2), rtol=1e-12)
  for reduce_variance in (False, True):
    np.testing.assert_allclose(sliced(k, reduce_variance), closed, rtol=1e-12, atol=1e-12)


def test_both_are_minimised_by_the_score():
  for loss in (denoising, lambda k: sliced(k, True), lambda k: sliced(k, False)):
    np.testing.assert_allclose(jax.grad(loss)(1 / VARIANCE), 0, atol=1e-12)


def test_slices_along_all_axes_give_the_trace():
  """E over v: the unit vectors times sqrt(d) give tr(ds/dx) + |s|^2 / 2 of a nonlinear score."""
  score = lambda x: jnp.stack([jnp.sin(x[:, 0] * x[:, 1]), x[:, 0] ** 2 - x[:, 1] ** 3], 1)
  x = jnp.array([[0.4, -1.1]])
  directions = jnp.sqrt(2.0) * jnp.eye(2)
  twice = jnp.repeat(x, 2, 0)
  wanted = 0.4 * 0 + np.cos(0.4 * -1.1) * -1.1 - 3 * 1.1**2 + (score(x) ** 2).sum() / 2
  for reduce_variance in (False, True):
    found = sliced_score_matching(score, twice, directions, reduce_variance).mean()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_ncsn_levels_count_alike():
  """With the exact score the loss of N(0, s^2) data is 1/2 s^2 / (s^2 + sigma^2) at each level."""
  _, sigmas = tabulate(processes.exponential(0.01, 50.0), np.linspace(1, 0, 6))
  sigmas = jnp.asarray(np.append(sigmas, 0.0))
  np.testing.assert_allclose(np.diff(np.log(sigmas[:-1])), np.log(0.01 / 50) / 5, rtol=1e-9)
  x0, eps, weights = normal_nodes(STD, 1.0)
  score = lambda x, a, s: -x / (STD**2 + s**2)[:, None]
  for sigma in sigmas:
    level = jnp.ones(len(x0)), jnp.full(len(x0), sigma)
    found = weights @ denoising_score_matching(score, x0, eps, *level)
    np.testing.assert_allclose(found, STD**2 / (STD**2 + sigma**2) / 2, rtol=1e-9)


def test_values_are_per_example_sums():
  ones = jnp.ones((3, 2, 2))
  level = jnp.ones(3), jnp.array([0.0, 1.0, 2.0])
  found = denoising_score_matching(lambda x, a, s: jnp.ones_like(x), ones, ones, *level)
  np.testing.assert_allclose(found, [4 / 2, 4 * 4 / 2, 4 * 9 / 2])
  assert sliced_score_matching(lambda x: -x, ones, ones).shape == (3,)
