"""Guidance turns a text-conditioned denoiser into an unconditional-looking one."""

import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser, TextDenoiser
from diffusion_jax.types import Text


def classifier_free(denoise: TextDenoiser, text: Text, negative: Text, scale: float) -> Denoiser:
  """Classifier-free guidance (Ho & Salimans 2022, eq. 6): negative + scale (text - negative).

  Scale 1 is the conditional model and costs one network call a step; any other scale costs one
  call on a batch twice as large. Extrapolating x_0 equals extrapolating epsilon at the same x.

  Args:
    text: [b l d]; negative: [b l d], the null caption or a negative prompt.
  """
  if scale == 1:
    return lambda x, alpha, sigma: denoise(x, alpha, sigma, text)
  both = jnp.concatenate([negative, text])

  def guided(x, alpha, sigma):
    without, with_text = jnp.split(denoise(jnp.concatenate([x, x]), alpha, sigma, both), 2)
    return without + scale * (with_text - without)

  return guided
