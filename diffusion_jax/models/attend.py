"""Scaled dot-product attention, by the way that is said or that suits device and lengths."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.attend_ways import choose, compute, refusal
from diffusion_jax.models.checks import require
from diffusion_jax.xla import chip


class Attends(nnx.Module):
  """A module with attention that has no mask and no bias.

  `attention` is one of `attend_ways.ATTENTION`, which `Network.of` sets.
  """

  attention = 'auto'

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by this module's way."""
    return attend(q, k, v, self.attention)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, attention: str = 'auto') -> jax.Array:
  """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), softmax in float32.

  q [b n h d], k and v [b l h d] -> [b n h d]. `attention` is one of `attend_ways.ATTENTION`.

  Raises:
    UserError: the way cannot serve on this platform, in this type or for heads of this size.
  """
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  return constrain(scaled_dot_product_attention(q, k, v, attention), 'queries')


@partial(jax.jit, static_argnums=3)
def scaled_dot_product_attention(  # By this name programs show it; its FLOPs are of a formula.
  q: jax.Array, k: jax.Array, v: jax.Array, attention: str = 'auto'
) -> jax.Array:
  """`attend` without a say about the mesh."""
  d = q.shape[-1]
  if attention == 'auto':
    attention = choose(*chip(), q.dtype, q.shape[1], k.shape[1], d)
  else:
    check_attention(attention, q.dtype, d)
  return compute(attention, q, k, v)


def check_attention(attention: str, dtype: jnp.dtype, d: int | None = None) -> None:
  """Raises UserError where that way cannot serve: heads of d channels, or any at all, here."""
  why = refusal(attention, *chip(), dtype, d)
  require(not why, f'attention {attention!r} cannot serve here: {why}.')
