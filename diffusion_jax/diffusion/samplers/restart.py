"""Restart sampling: a deterministic solver that goes back up and down again (Xu et al. 2023)."""

import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Keys,
  Pair,
  Trajectory,
  as_arrays,
  divide,
  fresh,
  intervals,
  noise_source,
  pairs_at,
  scan_steps,
)
from diffusion_jax.diffusion.samplers.two_step import heun_step
from diffusion_jax.types import Latents


def restart(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  low: float = 0.1, high: float = 2.0, steps: int = 6, repeats: int = 2, s_noise: float = 1.0,
  trajectory: bool = False,
) -> Latents | Trajectory:
  """Heun's method that goes `repeats` times from noise level `low` back up to `high`.

  Xu et al. 2023, algorithm 1 with one interval: at the pair nearest to `low`, noise lifts x to
  `high`, and `steps` Heun steps, spaced as `karras_levels`, bring it down again. The noise forgets
  errors of the steps before; the steps after it are deterministic.

  Args:
    low, high: noise levels sigma / alpha, each cut to those of the grid.
    s_noise: factor on the noise that lifts x.
  """
  noise = noise_source(keys)
  x, grid = as_arrays(x, grid)
  starts, ends = _with_restarts(grid, low, high, steps, repeats)
  before = tuple(
    jnp.concatenate([start[:1], end[:-1]]) for start, end in zip(starts, ends, strict=True)
  )

  def step(x, memory, here, there, index, before):
    scale = jnp.where(here[0] == before[0], 1, divide(here[0], before[0]))
    x = scale * x + s_noise * fresh(here[1], scale * before[1]) * noise(index, x)
    x, x0 = heun_step(denoise, x, here, there)
    return x, memory, x0

  return scan_steps(step, x, starts, ends, (before,), trajectory=trajectory)


def _with_restarts(grid: Grid, low, high, steps: int, repeats: int) -> tuple[Pair, Pair]:
  """The grid's steps with `repeats * steps` more where it passes `low`: pairs of start and end."""
  here, there = intervals(grid)
  levels = divide(there[1], there[0])
  distance = jnp.abs(jnp.log(jnp.where(levels > 0, levels, 1)) - jnp.log(low))
  turn = jnp.argmin(jnp.where(levels > 0, distance, jnp.inf))
  top = jnp.where(here[0][0] > 0, jnp.minimum(high, divide(here[1][0], here[0][0])), high)
  bottom = levels[turn]
  root = jnp.linspace(jnp.maximum(top, bottom) ** (1 / 7), bottom ** (1 / 7), steps + 1)
  alphas, sigmas = pairs_at(grid, (jnp.ones_like(root), root**7))
  inner = alphas.at[-1].set(there[0][turn]), sigmas.at[-1].set(there[1][turn])

  extra = repeats * steps
  k = jnp.arange(len(levels) + extra)
  main = jnp.where(k <= turn, k, jnp.maximum(k - extra, 0))
  again = (k > turn) & (k <= turn + extra)
  part = (k - turn - 1) % max(steps, 1)
  insert = lambda main_pairs, shift: tuple(
    jnp.where(again, of_restart[part + shift], of_main[main])
    for of_restart, of_main in zip(inner, main_pairs, strict=True)
  )
  return insert(here, 0), insert(there, 1)
