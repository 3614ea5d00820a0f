"""GroupNorm's own gradient against what JAX derives from the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.models.norms import group_norm


def formula(x, scale, bias, groups, epsilon, activate):
  """Wu & He 2018, eq. 1, as it is written."""
  b, n, c = x.shape
  y = x.reshape(b, n, groups, c // groups)
  mean, variance = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
  y = ((y - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias
  return nnx.silu(y) if activate else y


@pytest.mark.parametrize('activate', [False, True])
@pytest.mark.parametrize('offset', [0.0, 30.0])
def test_value_and_all_gradients(activate, offset):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 6)) + offset, jnp.float32)
  scale, bias, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (6, 6, x.shape))

  def run(norm):
    loss = lambda x, scale, bias: (norm(x, scale, bias, 3, 1e-3, activate) * w).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, scale, bias)

  with jax.enable_x64():
    x, scale, bias, w = (y.astype(jnp.float64) for y in (x, scale, bias, w))
    wanted = jax.tree.leaves(run(formula))
  x, scale, bias, w = (y.astype(jnp.float32) for y in (x, scale, bias, w))
  for a, b in zip(jax.tree.leaves(run(group_norm)), wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_gradients_of_gradients_exist():
  x = jax.random.normal(jax.random.key(0), (1, 4, 4))
  one, zero = jnp.ones(4), jnp.zeros(4)
  slope = lambda norm: jax.grad(lambda x: jnp.square(norm(x, one, zero, 2, 1e-3, True)).sum())
  penalty = lambda norm: jax.grad(lambda x: jnp.square(slope(norm)(x)).sum())(x)
  np.testing.assert_allclose(penalty(group_norm), penalty(formula), rtol=2e-3, atol=2e-3)
