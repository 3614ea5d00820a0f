"""What is known of a picture, held in every estimate of it.

A measurement y = A x_0 replaces what an estimate says of it: x_0 -> A^+ y + (1 - A^+ A) x_0 (Wang
et al. 2023, DDNM). Where the estimate is constant every sampler's state is alpha x_0 + sigma eps,
so the known part of the state is the picture noised to each step's level, with noise as fresh as
the sampler's own: the replacement of Lugmayr et al. 2022 (RePaint), eq. 8, for any sampler. It is
biased, as the noise of the known part says nothing of the rest; `samplers.resampling` mends that.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.types import Latents

Projection = Callable[[Latents], Latents]
"""An estimate of x_0 [b ...] -> the same with what is known in its place."""


def known_places(known: Latents, free: jax.Array) -> Projection:
  """Return the projection that holds `known` [b ...] wherever `free`, of its shape, is false."""
  return lambda x0: jnp.where(free, x0, known.astype(x0.dtype))


def known_averages(known: Latents, size: int) -> Projection:
  """Return the projection that holds the averages of `known` [b h w c] over squares of `size`.

  The constraint of ILVR (Choi et al. 2021) with averages for its low-pass filter: it enlarges a
  picture `size` times. `size` must divide h and w.
  """
  def average(x: Latents) -> Latents:
    b, h, w, c = x.shape
    squares = x.reshape(b, h // size, size, w // size, size, c)
    means = squares.mean(axis=(2, 4), keepdims=True)
    return jnp.broadcast_to(means, squares.shape).reshape(x.shape)

  return lambda x0: x0 + average(known.astype(x0.dtype) - x0)


def projected(denoise: Denoiser, project: Projection, *, variance: bool = False) -> Denoiser:
  """Return the denoiser with its estimates projected.

  variance: of two parts the second is a learned variance, which stays; else both are estimates.
  """
  def changed(x, alpha, sigma):
    out = denoise(x, alpha, sigma)
    if not isinstance(out, tuple):
      return project(out)
    x0, other = out
    return project(x0), other if variance else project(other)

  return changed
