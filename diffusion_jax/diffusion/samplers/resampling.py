"""Stretches of a grid sampled several times, with noise put back in between.

RePaint (Lugmayr et al. 2022, algorithm 1 and section 4.2): each time the rest of a picture comes to
agree better with what is known of it (`diffusion.projection`). For any sampler, which begins each
stretch anew.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Keys,
  Sampler,
  added_deviation,
  as_arrays,
  divide,
  is_padding,
  noise_source,
)
from diffusion_jax.diffusion.samplers.grid import Grid, padded
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

NOISES = 2**16
"""Numbers of noises that each stretch has for its own."""


def stretches(grid: Grid, jump: int, repeats: int) -> list[Grid]:
  """Cut a grid into stretches of `jump` steps, each `repeats` times, as they are to be sampled.

  They are counted from the end; the first steps, of one stretch at most, are taken once, as in the
  paper's schedule. UserError where that leaves nothing to repeat, or repeats too much.
  """
  steps = len(grid[0]) - 1
  if jump >= steps:
    raise UserError(
      f'{steps} sampling steps are no more than the {jump} of a jump, so that nothing is repeated; '
      'choose a resample_jump below them, or more steps.'
    )
  first = steps % jump or jump
  starts = [0] + [start for start in range(first, steps, jump) for _ in range(repeats)]
  if len(starts) * NOISES >= 2**31 - 2 * NOISES:
    raise UserError(
      f'{len(starts):,} stretches of steps are too many; choose fewer repeats, or a longer '
      'resample_jump.'
    )
  ends = [first] + [start + jump for start in starts[1:]]

  def cut(start: int, end: int) -> Grid:
    pairs = grid[0][start : end + 1], grid[1][start : end + 1]
    return *pairs, *(tuple(part[start:end] for part in via) for via in grid[2:])

  return [cut(*both) for both in zip(starts, ends, strict=True)]


def stacked(grids: list[Grid], count: int, steps: int) -> Grid:
  """Stretches as one grid of arrays [count steps + 1], on the host, filled up with padding."""
  grids = [padded(grid, steps) for grid in grids]
  more = [jax.tree.map(np.zeros_like, grids[0])] * (count - len(grids))
  return jax.tree.map(lambda *parts: np.stack(parts), *grids, *more)


def resampled(
  sampler: Sampler, denoise: Denoiser, x: Latents, grids: Grid, keys: Keys
) -> Latents:
  """Sample along stretches in turn; grids [n steps + 1] is `stacked`.

  Before a stretch that starts at more noise than the last one has left, x gets the noise that the
  process puts on it between both: x' = (a' / a) x + sqrt(s'^2 - (a' s / a)^2) z.
  """
  noise = noise_source(keys)
  x, grids = as_arrays(x, grids)

  def sample(state, grid, index):
    x, (a, s) = state
    start = grid[0][0], grid[1][0]
    own = lambda i, like: noise(index * NOISES + i, like)
    scale = jnp.where(start[0] == a, 1, divide(start[0], a))
    x = scale * x + added_deviation(start[1], scale * s) * own(NOISES - 1, x)
    last = (~is_padding(grid[:2])).sum() - 1
    return sampler(denoise, x, grid, own), (grid[0][last], grid[1][last])

  def body(state, row):
    grid, index = row
    padding = is_padding((grid[0][0], grid[1][0]))
    return jax.lax.cond(padding, lambda: state, lambda: sample(state, grid, index)), None

  first = grids[0][0, 0], grids[1][0, 0]
  (x, _), _ = jax.lax.scan(body, (x, first), (grids, jnp.arange(len(grids[0]))))
  return x
