"""Embeddings of the diffusion time and of other numbers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.layers import linear


def timestep_embedding(t: jax.Array, features: int, *, flip_sin_to_cos: bool = True,
                       freq_shift: float = 0.0, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoids of the time (Vaswani et al. 2017, sec. 3.5), float32: t [b] -> [b features].

  Frequencies are max_period^(-i / (features/2 - freq_shift)). Stable Diffusion puts cosines first
  (`flip_sin_to_cos`). An odd `features` is filled up with a zero.
  """
  half = features // 2
  exponents = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None]
  pair = jnp.sin(angles), jnp.cos(angles)
  pair = pair[::-1] if flip_sin_to_cos else pair
  pair = [constrain(part, 'vector') for part in pair]
  both = constrain(jnp.concatenate(pair, -1), 'vector')
  return jnp.pad(both, ((0, 0), (0, features % 2)))


class TimestepEmbedding(nnx.Module):
  """Two-layer SiLU MLP over the sinusoids: [b i] -> [b o]."""

  def __init__(self, in_features: int, out_features: int, **kw):
    self.linear_1 = linear(in_features, out_features, **kw)
    self.linear_2 = linear(out_features, out_features, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = constrain(self.linear_1(x), 'vector')
    return constrain(self.linear_2(nnx.silu(hidden)), 'vector')
