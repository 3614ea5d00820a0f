"""Score matching on Gaussian data, in expectation by exact quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.losses import sliced_score_matching
from tests.diffusion.quadrature import normal_nodes

VARIANCE = 1.6


def sliced(k, reduce_variance):
  """E of the sliced loss of the score -k x on N(0, VARIANCE) data, by quadrature."""
  x, v, weights = normal_nodes(np.sqrt(VARIANCE), 1.0)
  return weights @ sliced_score_matching(lambda x: -k * x, x, v, reduce_variance)


@pytest.mark.parametrize('reduce_variance', [False, True])
def test_the_sliced_loss_is_minimised_by_the_score(reduce_variance):
  """It is k^2 variance / 2 - k."""
  for k in (0.0, 0.3, 1 / VARIANCE, 2.0):
    closed = k**2 * VARIANCE / 2 - k
    np.testing.assert_allclose(sliced(k, reduce_variance), closed, rtol=1e-12, atol=1e-12)
  slope = jax.grad(lambda k: sliced(k, reduce_variance))(1 / VARIANCE)
  np.testing.assert_allclose(slope, 0, atol=1e-12)


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


def test_values_are_per_example():
  ones = jnp.ones((3, 2, 2))
  assert sliced_score_matching(lambda x: -x, ones, ones).shape == (3,)
