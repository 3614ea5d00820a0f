"""Other classifier-free guidance than an extrapolation: CFG++ and CFG-Zero*.

Both call a denoiser once on a batch twice as large, as `denoiser.classifier_free` does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser, Scale, TextDenoiser
from diffusion_jax.diffusion.parameterization import expand
from diffusion_jax.types import Latents, Text


def _both(denoise: TextDenoiser, text: Text, negative: Text) -> Callable:
  """Return (x, alpha, sigma) -> estimates with the text, and without."""
  every = jax.tree.map(lambda *parts: jnp.concatenate(parts), text, negative)

  def both(x: Latents, alpha: jax.Array, sigma: jax.Array) -> tuple[Latents, Latents]:
    found = denoise(jnp.concatenate([x, x]), alpha, sigma, every)
    return found[: len(x)], found[len(x) :]

  return both


def plus_plus(denoise: TextDenoiser, text: Text, negative: Text, scale: Scale) -> Denoiser:
  """CFG++ (Chung et al. 2024, algorithm 2): (guided x_0, x_0 without the text), for `ddim`.

  With its option keep_epsilon that goes to alpha' x_0 + sigma' eps, of the guided x_0, but of the
  eps without the text, so that a scale in [0, 1] interpolates and stays near the data.
  """
  both = _both(denoise, text, negative)

  def guided(x, alpha, sigma):
    with_text, without = both(x, alpha, sigma)
    return without + expand(jnp.asarray(scale, x.dtype), x) * (with_text - without), without

  return guided


def zero_star(
  denoise: TextDenoiser, text: Text, negative: Text, scale: Scale, first: jax.Array
) -> Denoiser:
  """CFG-Zero* (Fan et al. 2025, eq. 10 and algorithm 1), of a flow x = (1 - t) x_0 + t eps.

  s v + scale (v_text - s v), where v is the velocity without the text and s = <v_text, v> / |v|^2,
  for each image, fits it to that with the text. first: sigma of the first step, which is not taken:
  its velocity is 0, as what networks say of pure noise is worse than nothing.
  """
  both = _both(denoise, text, negative)
  inner = lambda a, b: (a * b).reshape(len(a), -1).sum(axis=1)

  def guided(x, alpha, sigma):
    with_text, without = ((x - x0) / sigma for x0 in both(x, alpha, sigma))
    fitted = expand(inner(with_text, without) / (inner(without, without) + 1e-8), x) * without
    velocity = fitted + expand(jnp.asarray(scale, x.dtype), x) * (with_text - fitted)
    return x - sigma * jnp.where(sigma >= first, 0, velocity)

  return guided
