"""The norms' own gradients against what JAX derives from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.models.network import Compute
from diffusion_jax.models.norms import LayerNorm, group_norm, layer_norm


def formula(x, scale, bias, groups, epsilon, activate):
  """Wu & He 2018, eq. 1, as it is written."""
  b, n, c = x.shape
  y = x.reshape(b, n, groups, c // groups)
  mean, variance = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
  y = ((y - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias
  return nnx.silu(y) if activate else y


def layer_formula(x, scale, bias, epsilon):
  """Ba et al. 2016, section 3."""
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(variance + epsilon) * scale + bias


def assert_as_in_float64(ours, formula, offset: float):
  """Value and gradients in float32 beside the formula's in float64."""
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(2, 5, 6)) + offset)
  args = (x, *(np.float32(rng.normal(size=6)) for _ in range(2)))
  w = np.float32(rng.normal(size=x.shape))

  def run(norm, *args):
    loss = lambda *args: (norm(*args) * w).sum()
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args))

  with jax.enable_x64():
    wanted = run(formula, *map(jnp.float64, args))
  for a, b in zip(run(ours, *args), wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('offset', [0.0, 30.0])
def test_layer_norm(offset):
  with_epsilon = lambda norm: lambda *args: norm(*args, 1e-3)
  assert_as_in_float64(with_epsilon(layer_norm), with_epsilon(layer_formula), offset)


def test_layer_norm_in_half_precision_has_statistics_in_float32():
  norm = LayerNorm(64, compute=Compute(jnp.bfloat16), rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (3, 64)), jnp.bfloat16)
  y = norm(x)
  wanted = layer_formula(np.float64(x), 1.0, 0.0, 1e-5)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(y), wanted, atol=0.02)


@pytest.mark.parametrize('activate', [False, True])
@pytest.mark.parametrize('offset', [0.0, 30.0])
def test_value_and_all_gradients(activate, offset):
  with_rest = lambda norm: lambda *args: norm(*args, 3, 1e-3, activate)
  assert_as_in_float64(with_rest(group_norm), with_rest(formula), offset)


def test_gradients_of_gradients_exist():
  x = jax.random.normal(jax.random.key(0), (1, 4, 4))
  one, zero = jnp.ones(4), jnp.zeros(4)
  slope = lambda norm: jax.grad(lambda x: jnp.square(norm(x, one, zero, 2, 1e-3, True)).sum())
  penalty = lambda norm: jax.grad(lambda x: jnp.square(slope(norm)(x)).sum())(x)
  np.testing.assert_allclose(penalty(group_norm), penalty(formula), rtol=2e-3, atol=2e-3)
