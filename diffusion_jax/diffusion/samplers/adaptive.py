"""The probability-flow ODE by a Runge-Kutta method that chooses its own steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Keys,
  Trajectory,
  as_arrays,
  epsilon,
  intervals,
  move,
  moves,
  pair_number,
  pairs_at,
  step_count,
  to_the_end,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.types import Latents

if TYPE_CHECKING:
  import diffrax


def probability_flow(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 4096,
  solver: diffrax.AbstractSolver | None = None, trajectory: bool = False,
) -> Latents | Trajectory:
  """The probability-flow ODE by an adaptive Runge-Kutta method (Song et al. 2021, section 4.3).

  In u = x / |(alpha, sigma)| and the angle phi = atan2(sigma, alpha), where the slope is the v
  prediction cos(phi) eps - sin(phi) x_0 (Salimans & Ho 2022, appendix D), finite at alpha = 0. Of
  the grid only the ends matter, and the process its pairs lie on; a last step to sigma = 0 is
  DDIM's. One step serves the whole batch: an image depends on its batch within the tolerance.

  Args:
    rtol, atol: tolerances on the error of u in each step.
    max_steps: steps after which it fails with a `RuntimeError`.
    solver: of diffrax; `Dopri5`, six network calls a step, if not given.
    trajectory: its states are at the grid's pairs.
  """
  import diffrax  # Takes a second to load, and no other sampler needs it.

  del keys
  x, grid = as_arrays(x, grid)
  grid = to_the_end(grid)
  angles, norms = jnp.arctan2(grid[1], grid[0]), jnp.hypot(*grid)
  # The slope at phi = 0 is 0 / 0, so that the ODE ends at the pair before the clean one.
  before = step_count(grid) - 1
  end = jnp.where(angles[-1] > 0, angles[-1], angles[before])

  def velocity(phi, u, args):
    del args
    c, d = jnp.cos(phi), jnp.sin(phi)
    a, s = pairs_at(grid, (c, d))
    x0 = denoise(jnp.hypot(a, s) * u, a, s)
    return (c * epsilon(u, x0, (c, d)) - d * x0).astype(u.dtype)

  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(velocity), solver or diffrax.Dopri5(), angles[0], end, None, x / norms[0],
    max_steps=max_steps, stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    saveat=diffrax.SaveAt(ts=jnp.maximum(angles, end)[1:] if trajectory else end[None]),
  )

  def to_clean():
    here, there = pair_number(grid, before), pair_number(grid, -1)
    last = norms[before] * solution.ys[-1]
    return move(last, denoise(last, *here), here, there).astype(x.dtype)

  sample = jax.lax.cond(angles[-1] > 0, lambda: norms[-1] * solution.ys[-1], to_clean)
  if not trajectory:
    return sample
  states = solution.ys * norms[1:].reshape(-1, *(1,) * x.ndim)
  reached = (jnp.arange(len(states)) >= before).reshape(-1, *(1,) * x.ndim)
  states = jnp.where(reached, sample, states)
  starts = jnp.concatenate([x[None], states[:-1]])
  here, there = intervals(grid)
  estimate = lambda row: jax.lax.cond(
    moves(*row[1:]), lambda: denoise(row[0], *row[1]).astype(x.dtype), lambda: row[0]
  )
  x0 = jax.lax.map(estimate, (starts, here, there))
  return Trajectory(sample, states, x0, grid[0][1:], grid[1][1:])
