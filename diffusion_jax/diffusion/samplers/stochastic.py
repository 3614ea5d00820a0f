"""Single-step stochastic solvers of the second order: two network calls a step.

Each step goes to less than the wanted noise and adds the rest afresh. A step from alpha = 0 or to
sigma = 0 is of the first order.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Keys,
  Trajectory,
  ancestral,
  divide,
  is_inner,
  log_midpoint,
  move,
  noise_source,
  walk,
)
from diffusion_jax.types import Latents


def dpmpp_2s_ancestral(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, trajectory: bool = False,
) -> Latents | Trajectory:
  """DPM-Solver++(2S) to less than the wanted noise, then the rest as fresh noise (k-diffusion).

  The solver is Lu et al. 2022, DPM-Solver++, algorithm 1 with r = 1/2.

  Args:
    eta: share of the posterior's deviation that is added as noise; 0 is DPM-Solver++(2S).
    s_noise: factor on that noise.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    x0 = denoise(x, *here)
    down, up = ancestral(here, there, eta)
    target = (there[0], down)

    def at_middle():
      middle = log_midpoint(here, there, target)
      return denoise(move(x, x0, here, middle), *middle).astype(x.dtype)

    used = jax.lax.cond(is_inner(here, target), at_middle, lambda: x0.astype(x.dtype))
    x = move(x, used, here, target)
    return (x + s_noise * up * noise(index, x) if eta else x), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def dpmpp_sde(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, trajectory: bool = False,
) -> Latents | Trajectory:
  """DPM-Solver++(SDE) (k-diffusion): an ancestral step to the log-midpoint, its x_0 for the whole.

  Both noises of a step come from one Brownian path in sigma / alpha, as k-diffusion draws them: the
  correlation makes the variance right to second order in the step, independent noise only to first.
  Draws 2 i and 2 i + 1 belong to step i.

  Args:
    eta: share of the posterior's deviation that is added as noise.
    s_noise: factor on that noise.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    x0 = denoise(x, *here)
    z = noise(2 * index, x) if eta else jnp.zeros_like(x)

    def at_middle():
      middle = log_midpoint(here, there)
      down, up = ancestral(here, middle, eta)
      x_middle = move(x, x0, here, (middle[0], down)) + s_noise * up * z
      return denoise(x_middle, *middle).astype(x.dtype), path_correlation(here, middle, there)

    used, shared = jax.lax.cond(
      is_inner(here, there), at_middle, lambda: (x0.astype(x.dtype), jnp.zeros_like(here[0]))
    )
    down, up = ancestral(here, there, eta)
    x = move(x, used, here, (there[0], down))
    if eta:
      z = shared * z + jnp.sqrt((1 - shared) * (1 + shared)) * noise(2 * index + 1, x)
      x = x + s_noise * up * z
    return x, memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def path_correlation(here, middle, there) -> jax.Array:
  """Of a Brownian path's increments from r to the middle and from r to r', r = sigma / alpha."""
  r, r_middle, r_next = (divide(pair[1], pair[0]) for pair in (here, middle, there))
  return jnp.sqrt((r - r_middle) / (r - r_next))
