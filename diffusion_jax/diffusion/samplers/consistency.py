"""Samplers of distilled networks, whose denoiser jumps to x_0 in one call and is noised again."""

import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Keys,
  Trajectory,
  divide,
  fresh,
  move,
  noise_source,
  pairs_at,
  walk,
)
from diffusion_jax.types import Latents


def lcm(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *, trajectory: bool = False
) -> Latents | Trajectory:
  """Multistep consistency sampling: x' = alpha' f(x) + sigma' z.

  Song et al. 2023, algorithm 1; Luo et al. 2023. The denoiser is the consistency
  function f with its boundary condition f(x) = x at the least noise.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    x0 = denoise(x, *here)
    return there[0] * x0 + there[1] * noise(index, x), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def tcd(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  gamma: float = 0.3, landing: Grid | None = None, trajectory: bool = False,
) -> Latents | Trajectory:
  """Trajectory consistency: a jump to less noise than wanted, then noise.

  Strategic stochastic sampling of Zheng et al. 2024.

  Args:
    gamma: 0 jumps to each next pair itself (DDIM), 1 to clean data (`lcm`).
    landing: (alphas, sigmas) [n], the pairs to jump to; the paper's are those at the time (1 -
      gamma) t of the schedule. Without, those of the grid (its third part) and, if it has none,
      those for which atan2(sigma, alpha) stands for the time.
  """
  noise = noise_source(keys)
  alphas, sigmas, *of_grid = grid
  alphas, sigmas = jnp.asarray(alphas), jnp.asarray(sigmas)
  if landing is None and of_grid:
    landing = of_grid[0]
  elif landing is None and not gamma:
    landing = alphas[1:], sigmas[1:]
  elif landing is None:
    angles = (1 - gamma) * jnp.arctan2(sigmas[1:], alphas[1:])
    landing = pairs_at((alphas, sigmas), (jnp.cos(angles), jnp.sin(angles)))

  def step(x, memory, here, there, index, landing):
    x0 = denoise(x, *here)
    scale = divide(there[0], landing[0])
    x = scale * move(x, x0, here, landing)
    return x + fresh(there[1], scale * landing[1]) * noise(index, x), memory, x0

  return walk(step, x, grid, (landing,), trajectory=trajectory)
