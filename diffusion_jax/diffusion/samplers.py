"""Samplers: scans over a grid of (alpha, sigma) pairs that turn noise into data.

Each is `sampler(denoise, x, grid, keys)`: `denoise(x, alpha, sigma) -> x_0` is any denoiser, x
[b h w c] is noise of the grid's first sigma, the grid runs from noise to data, and keys [b] are one
random key per image, so that an image does not depend on the batch it was drawn in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.schedules import Grid
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

Sampler = Callable[[Denoiser, Latents, Grid, jax.Array], Latents]


def _pairs(grid: Grid):
  """Scan inputs: ((alpha, sigma), (next alpha, next sigma), index)."""
  alphas, sigmas = grid
  here, there = (alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:])
  return here, there, jnp.arange(len(alphas) - 1)


def _noise(keys: jax.Array, index: jax.Array, like: jax.Array) -> jax.Array:
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, index), like.shape[1:], like.dtype)
  return jax.vmap(draw)(keys)


def ddim(denoise: Denoiser, x: Latents, grid: Grid, keys: jax.Array) -> Latents:
  """DDIM with eta = 0 (Song et al. 2021, eq. 12); also Euler on the probability-flow ODE.

  Deterministic, first order, one network call a step.
  """
  del keys

  def step(x, pair):
    (a, s), (a_next, s_next), _ = pair
    x0 = denoise(x, a, s)
    return a_next * x0 + s_next * (x - a * x0) / s, None

  return jax.lax.scan(step, x, _pairs(grid))[0]


def ddpm(denoise: Denoiser, x: Latents, grid: Grid, keys: jax.Array) -> Latents:
  """Ancestral sampling with the posterior's own variance (Ho et al. 2020, eq. 6 and 7).

  Equals DDIM with eta = 1 (Song et al. 2021, eq. 16). Stochastic, one network call a step.
  """

  def step(x, pair):
    (a, s), (a_next, s_next), index = pair
    x0 = denoise(x, a, s)
    added = jnp.maximum(s**2 - (a / a_next * s_next) ** 2, 0.0)  # noise added from there to here
    variance = added * (s_next / s) ** 2
    eps = (x - a * x0) / s
    mean = a_next * x0 + jnp.sqrt(jnp.maximum(s_next**2 - variance, 0.0)) * eps
    return mean + jnp.sqrt(variance) * _noise(keys, index, x), None

  return jax.lax.scan(step, x, _pairs(grid))[0]


def heun(denoise: Denoiser, x: Latents, grid: Grid, keys: jax.Array) -> Latents:
  """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1).

  The ODE is dy/dlambda = eps with y = x / alpha and lambda = sigma / alpha. Deterministic, second
  order, two network calls a step. A step from alpha = 0 or to sigma = 0 is DDIM's: there y or the
  slope is not finite.
  """
  del keys

  def step(x, pair):
    (a, s), (a_next, s_next), _ = pair
    x0 = denoise(x, a, s)
    eps = (x - a * x0) / s
    euler = a_next * x0 + s_next * eps

    def correct():
      eps_next = (euler - a_next * denoise(euler, a_next, s_next)) / s_next
      return a_next * (x / a + (s_next / a_next - s / a) * (eps + eps_next) / 2)

    return jax.lax.cond((a > 0) & (s_next > 0), correct, lambda: euler), None

  return jax.lax.scan(step, x, _pairs(grid))[0]


def dpmpp_2m(denoise: Denoiser, x: Latents, grid: Grid, keys: jax.Array) -> Latents:
  """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), first order in its first and last step.

  Deterministic, second order, one network call a step.
  """
  del keys
  alphas, sigmas = grid
  half_log_snr = jnp.log(alphas / sigmas)
  h = jnp.diff(half_log_snr)
  # h_i / (2 h_{i-1}): 0 where the previous step is missing or infinite, or this one ends the grid.
  weight = jnp.append(0.0, h[1:] / (2 * h[:-1])).at[-1].set(0.0)
  weight = jnp.where(jnp.isfinite(weight), weight, 0.0)

  def step(carry, pair):
    x, previous = carry
    (a, s), (a_next, s_next), index = pair
    x0 = denoise(x, a, s)
    extrapolated = x0 + weight[index] * (x0 - previous)
    x = (s_next / s) * x + (a_next - s_next * a / s) * extrapolated
    return (x, x0), None

  return jax.lax.scan(step, (x, jnp.zeros_like(x)), _pairs(grid))[0][0]


SAMPLERS: dict[str, Sampler] = {'ddim': ddim, 'ddpm': ddpm, 'heun': heun, 'dpmpp_2m': dpmpp_2m}


def sampler(name: str) -> Sampler:
  """The sampler of that name.

  Raises:
    UserError: for a name that is not in the table.
  """
  if name not in SAMPLERS:
    raise UserError(f'sampler {name!r} is unknown; choose one of {", ".join(SAMPLERS)}.')
  return SAMPLERS[name]


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]):
  """(noise [count, *shape], keys [count]) of images `first` to `first + count - 1` of a seed.

  Image i has the same noise whatever the batch it is drawn in.
  """
  root = jax.random.key(seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(first, first + count))
  pairs = jax.vmap(jax.random.split)(keys)
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(pairs[:, 0])
  return noise, pairs[:, 1]
