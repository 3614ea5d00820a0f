"""Group and layer normalisation; statistics and sums in float32 whatever `dtype` is."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.backend.cpu import along_features, over_groups, over_leading, over_positions
from diffusion_jax.backend.xla import optimization_barrier
from diffusion_jax.errors import require
from diffusion_jax.models.network import PLAIN, Compute


class LayerNorm(nnx.Module):
  """Layer normalisation (Ba et al. 2016, section 3) of [... c]; parameters: scale [c], bias [c]."""

  def __init__(
    self, features: int, epsilon: float = 1e-5, *, compute: Compute = PLAIN, rngs: nnx.Rngs
  ):
    del rngs  # Scale and bias start at one and zero.
    self.scale = nnx.Param(jnp.ones((features,), compute.param_dtype))
    self.bias = nnx.Param(jnp.zeros((features,), compute.param_dtype))
    self.epsilon, self.dtype = epsilon, compute.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
    y = layer_norm(x, scale, bias, self.epsilon)
    return y.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """[... c] of any type, scale and bias [c] float32 -> [... c] float32; a gradient of its own."""
  return _normalized(x, scale, bias, epsilon)[0]


def _normalized(x, scale, bias, epsilon):
  mean = along_features(x) / x.shape[-1]
  away = x.astype(jnp.float32) - mean
  inverse = lax.rsqrt(along_features(jnp.square(away)) / x.shape[-1] + epsilon)
  return away * inverse * scale + bias, (x, scale, mean, inverse)


def _layer_gradients(epsilon, saved, dy):
  del epsilon
  x, scale, mean, inverse = saved
  n = x.shape[-1]
  normal = (x.astype(jnp.float32) - mean) * inverse
  turned = dy * normal
  flat, slope = along_features(dy, scale) / n, along_features(turned, scale) / n
  dx = inverse * (dy * scale - flat - normal * slope)
  return dx.astype(x.dtype), over_leading(turned), over_leading(dy)


layer_norm.defvjp(_normalized, _layer_gradients)


def normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """LayerNorm without parameters over the last axis, statistics in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """x scale / sqrt(mean(x^2) + epsilon) (Zhang & Sennrich 2019, eq. 4) in float32: [... d]."""

  def __init__(self, features: int, epsilon: float, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    del rngs  # The scale starts at one.
    self.scale = nnx.Param(jnp.ones((features,), compute.param_dtype))
    self.epsilon, self.dtype = epsilon, compute.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class GroupNorm(nnx.Module):
  """Group normalisation (Wu & He 2018, eq. 1) over [b ... c]; parameters: scale [c], bias [c].

  activate=True: silu of the result, without another pass over the data, forwards or backwards.
  """

  def __init__(
    self, groups: int, features: int, epsilon: float, *, compute: Compute = PLAIN,
    rngs: nnx.Rngs,
  ):
    del rngs  # Scale and bias start at one and zero.
    require(features % groups == 0, f'{groups} groups do not divide {features} channels.')
    self.scale = nnx.Param(jnp.ones((features,), compute.param_dtype))
    self.bias = nnx.Param(jnp.zeros((features,), compute.param_dtype))
    self.groups, self.epsilon, self.dtype = groups, epsilon, compute.dtype

  def __call__(self, x: jax.Array, activate: bool = False) -> jax.Array:
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
    y = group_norm(flat, scale, bias, self.groups, self.epsilon, activate)
    return y.astype(self.dtype).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float, activate: bool
) -> jax.Array:
  """[b n c] of any type, scale and bias [c] in float32 -> [b n c] in float32.

  Its own gradient is two sums and one pass; JAX's takes many, a kernel each.
  """
  return _forward(x, scale, bias, groups, epsilon, activate)[0]


# Jitted, as is the gradient, so that what is alike for all norms of one shape is traced once.
@partial(jax.jit, static_argnums=(3, 4, 5))
def _forward(x, scale, bias, groups, epsilon, activate):
  # One pass gives both moments, about the first position so that a large mean does not cancel.
  # Summing positions before channels keeps the channels contiguous: 2-3 times faster on CPUs than
  # reducing groups at once.
  shift = over_groups(x[:, 0].astype(jnp.float32), groups)
  away = x.astype(jnp.float32) - shift[:, None]
  n = x.shape[1]
  mean = over_groups(over_positions(away) / n, groups)
  square = over_groups(over_positions(jnp.square(away)) / n, groups)
  inverse = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + epsilon)
  y = _centered(x, shift, mean) * (inverse * scale)[:, None] + bias
  return nnx.silu(y) if activate else y, (x, scale, bias, shift, mean, inverse)


def _centered(x, shift, mean):
  # Not x - (shift + mean), which would be rounded to what a large mean leaves of it.
  return x.astype(jnp.float32) - shift[:, None] - mean[:, None]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(groups, epsilon, activate, saved, dz):
  del epsilon
  x, scale, bias, shift, mean, inverse = saved
  dy = dz
  if activate:
    y = _centered(x, shift, mean) * (inverse * scale)[:, None] + bias
    gate = nnx.sigmoid(y)
    dy = optimization_barrier(dz * gate * (1 + y * (1 - gate)))
  away = _centered(x, shift, mean)
  total, along = over_positions(dy), over_positions(dy * away) * inverse
  n = x.shape[1]
  # Of the gradient for normalised values, its mean and its part along them leave each group.
  flat = over_groups(total * scale, groups) / n
  slope = over_groups(along * scale, groups) / n * inverse
  dx = inverse[:, None] * (dy * scale - flat[:, None] - away * slope[:, None])
  return dx.astype(x.dtype), over_leading(along), over_leading(total)


group_norm.defvjp(_forward, _backward)
