"""Scaled dot-product attention by name, chosen by platform where none is named."""

import jax

from diffusion_jax.layout import constrain, on_each_device
from diffusion_jax.models.attend_chunked import chunked


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

  q [b n h d], k and v [b l h d] -> [b n h d].
  """
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  if jax.default_backend() == 'cpu':
    return on_each_device(chunked, ('queries', 'keys', 'keys'), 'queries')(q, k, v)
  return constrain(jax.nn.dot_product_attention(q, k, v), 'queries')
