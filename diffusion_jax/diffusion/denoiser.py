"""What a network predicts, and how any prediction becomes an estimate of the clean sample x_0.

With x = alpha x_0 + sigma eps, a prediction is one of
  epsilon       eps                        (Ho et al. 2020, eq. 14)
  sample        x_0
  v_prediction  v = alpha eps - sigma x_0  (Salimans & Ho 2022, appendix D)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.types import Latents, Text

PREDICTIONS = ('epsilon', 'sample', 'v_prediction')

Denoiser = Callable[[Latents, jax.Array, jax.Array], Latents]
"""D(x [b h w c], alpha [], sigma []) -> estimate of x_0 [b h w c]."""

TextDenoiser = Callable[[Latents, jax.Array, jax.Array, Text], Latents]
"""The same, conditioned on text [b l d]."""


def expand(value: jax.Array, like: jax.Array) -> jax.Array:
  """[b] or [] -> broadcastable against `like` [b ...]."""
  return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def target(prediction: str, x0, eps, alpha, sigma) -> jax.Array:
  """What the network is asked to output; alpha and sigma are [b] or []."""
  alpha, sigma = expand(alpha, x0), expand(sigma, x0)
  return {
    'epsilon': lambda: eps,
    'sample': lambda: x0,
    'v_prediction': lambda: alpha * eps - sigma * x0,
  }[prediction]()


def to_x0(prediction: str, output, x, alpha, sigma) -> jax.Array:
  """Estimate of x_0 from the network's output; needs alpha > 0 for 'epsilon'."""
  alpha, sigma = expand(alpha, x), expand(sigma, x)
  return {
    'epsilon': lambda: (x - sigma * output) / alpha,
    'sample': lambda: output,
    'v_prediction': lambda: (alpha * x - sigma * output) / (alpha**2 + sigma**2),
  }[prediction]()


def text_denoiser(
  network: Callable[[Latents, jax.Array, Text], Latents], schedule: Schedule, prediction: str
) -> TextDenoiser:
  """Wraps `network(x, t [b], text)` as a denoiser; computes in float32 outside the network."""

  def denoise(x, alpha, sigma, text):
    t = jnp.broadcast_to(schedule.timestep(alpha, sigma), x.shape[:1])
    output = network(x, t, text).astype(jnp.float32)
    return to_x0(prediction, output, x, alpha, sigma)

  return denoise
