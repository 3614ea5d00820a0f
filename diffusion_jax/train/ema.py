"""Exponential moving average of the parameters."""

import jax
import jax.numpy as jnp

from diffusion_jax.types import Params


def decay_per_step(halflife_images: float, batch_size: int, step: jax.Array) -> jax.Array:
  """Factor that halves an old weight's share every `halflife_images` images.

  Early on it is min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten.

  Args:
    step: number of updates made before this one, 0 for the first.
  """
  decay = 0.5 ** (batch_size / halflife_images)
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))


def update(ema: Params, params: Params, decay: jax.Array) -> Params:
  """decay * ema + (1 - decay) * params, in float32."""
  return jax.tree.map(lambda e, p: _moved(e, p, decay), ema, params)


@jax.jit  # So that parameters of one shape are traced once.
def _moved(e: jax.Array, p: jax.Array, decay: jax.Array) -> jax.Array:
  return e + (1 - decay) * (p.astype(e.dtype) - e)
