"""Blocks that are alike are traced once, and each computes with its own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.models.layers import Linear
from diffusion_jax.models.network import Blocks

TRACED = []


class Layer(nnx.Module):
  """Writes down each time that it is traced."""

  def __init__(self, i, o, rngs):
    self.dense = Linear(i, o, rngs=rngs)

  def __call__(self, x):
    TRACED.append(x.shape)
    return jnp.tanh(self.dense(x))


class Stack(Blocks):
  """Five layers, of which four are alike."""

  def __init__(self, remat):
    rngs = nnx.Rngs(0)
    self.layers = nnx.List([Layer(3, 4, rngs), *[Layer(4, 4, rngs) for _ in range(4)]])
    self.remat = remat

  def __call__(self, x):
    for layer in self.layers:
      x = self.run(layer, x)
    return x


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_alike_is_traced_once_and_computed_each_on_its_own(remat):
  jax.clear_caches()
  TRACED.clear()
  stack, x = Stack(remat), np.ones((2, 3), np.float32)
  kernels = [np.asarray(layer.dense.kernel[...]) for layer in stack.layers]
  found = jax.jit(jax.value_and_grad(lambda x: stack(x).sum()))(x)
  assert TRACED == [(2, 3), (2, 4)]
  y, passed = x, []
  for kernel in kernels:
    y = np.tanh(y @ kernel)
    passed.append(y)
  slope = np.ones_like(y)
  for kernel, y in zip(reversed(kernels), reversed(passed), strict=True):
    slope = slope * (1 - y**2) @ kernel.T
  np.testing.assert_allclose(found[0], passed[-1].sum(), rtol=1e-5)
  np.testing.assert_allclose(found[1], slope, rtol=1e-4)
