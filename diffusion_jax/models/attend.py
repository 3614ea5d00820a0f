"""Scaled dot-product attention, by the way that suits the platform."""

import jax

from diffusion_jax.layout import constrain, on_each_device
from diffusion_jax.models.attend_chunked import chunked


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), softmax in float32.

  q [b n h d], k and v [b l h d] -> [b n h d]. On CPUs `chunked`, elsewhere what JAX has.
  """
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  return constrain(scaled_dot_product_attention(q, k, v), 'queries')


@jax.jit  # Under this name programs show it, and its FLOPs are counted by formula.
def scaled_dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """`attend` without a say about the mesh."""
  if jax.default_backend() == 'cpu':
    return on_each_device(chunked, ('queries', 'keys', 'keys'), 'queries')(q, k, v)
  return jax.nn.dot_product_attention(q, k, v)
