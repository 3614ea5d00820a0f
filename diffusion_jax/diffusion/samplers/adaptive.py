"""Samplers that choose their own steps, from an estimate of the error of each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Keys,
  Pair,
  SamplerInfo,
  Trajectory,
  ancestral,
  as_arrays,
  epsilon,
  intervals,
  is_padding,
  move,
  moves,
  noise_source,
  pairs_at,
  step_count,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents


def pair_number(grid: Grid, i) -> Pair:
  return grid[0][i], grid[1][i]


def to_the_end(grid: Grid) -> Grid:
  """The grid with its last pair in place of its padding."""
  alphas, sigmas, *_ = grid
  padding, last = is_padding((alphas, sigmas)), step_count(grid)
  return jnp.where(padding, alphas[last], alphas), jnp.where(padding, sigmas[last], sigmas)


def probability_flow(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *, rtol: float = 1e-5,
  atol: float = 1e-5, max_steps: int = 4096, trajectory: bool = False,
) -> Latents | Trajectory:
  """The probability-flow ODE by Dormand-Prince 5(4) (Song et al. 2021, section 4.3).

  In u = x / |(alpha, sigma)| and the angle phi = atan2(sigma, alpha), where the slope is the v
  prediction cos(phi) eps - sin(phi) x_0 (Salimans & Ho 2022, appendix D), finite at alpha = 0. Only
  the grid's ends and process matter; a last step to sigma = 0 is DDIM's. The batch shares its
  steps: an image depends on it within the tolerance.

  rtol, atol: tolerances on the error of u in each step. max_steps: steps before a `RuntimeError`.
  trajectory: at the grid's pairs.
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
    diffrax.ODETerm(velocity), diffrax.Dopri5(), angles[0], end, None, x / norms[0],
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


class Progress(NamedTuple):
  """y = x / alpha [b ...] and the lower estimate it came with, at lam = ln(alpha / sigma).

  h: next step in lam. errors: inverse ones of the last three steps, newest first. tried, accepted:
  counts of steps. rows: of the trajectory, if wanted.
  """

  y: jax.Array
  low: jax.Array
  lam: jax.Array
  h: jax.Array
  errors: jax.Array
  tried: jax.Array
  accepted: jax.Array
  rows: tuple


def dpm_adaptive(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05,
  pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81,
  eta: float = 0.0, s_noise: float = 1.0, max_steps: int = 200, trajectory: bool = False,
) -> Latents | Trajectory:
  """DPM-Solver-12 or -23 with a PID controller of the step (k-diffusion).

  Of the grid only the ends matter, and the process its pairs lie on. A first step from alpha = 0
  and a last step to sigma = 0, from the pair before, are DDIM's. One step serves the whole batch:
  an image depends on its batch within the tolerance.

  Args:
    order: 2 or 3, of the better of the two estimates whose difference is the error, and the
      number of network calls a step.
    rtol, atol: tolerances on the error of y = x / alpha.
    h_init: first step, in ln(alpha / sigma).
    pcoeff, icoeff, dcoeff: of a PID controller of the step; accept_safety: least factor by which
      the next step is longer for a step to be accepted.
    eta: fraction of the posterior's deviation that each step adds as noise; s_noise: factor on it.
    max_steps: steps, refused ones included, after which one DDIM step goes to the end.
    trajectory: of accepted steps, in max_steps rows; those after the last repeat the sample.
  """
  if order not in (2, 3):
    raise UserError(f'order of dpm_adaptive is {order}; choose 2 or 3.')
  noise = noise_source(keys)
  x, grid = as_arrays(x, grid)
  grid = to_the_end(grid)
  x, start = _off_pure_noise(denoise, x, grid)
  last = pair_number(grid, step_count(grid) - (grid[1][-1] == 0))
  end = _half_log_snr(last)
  scale = 1.5 if eta else order
  gains = ((pcoeff + icoeff + dcoeff) / scale, -(pcoeff + 2 * dcoeff) / scale, dcoeff / scale)

  def attempt(now):
    t = jnp.minimum(end, now.lam + now.h)
    target, up = _split(now.lam, t, end, eta)
    low, high, x0 = two_estimates(denoise, grid, now.y, now.lam, target, order)
    accept, factor, errors = _judge(now, low, high, rtol, atol, gains, accept_safety)
    if eta:
      high = high + s_noise * up * noise(now.accepted, high)
    a, s = _pair_at(grid, t)
    place = lambda row, value: jnp.where(accept, row.at[now.accepted].set(value), row)
    rows = tuple(map(place, now.rows, (a * high, x0, a, s)))
    keep = lambda new, old: jnp.where(accept, new, old)
    return Progress(
      keep(high, now.y), keep(low, now.low), keep(t, now.lam), now.h * factor, errors,
      now.tried + 1, now.accepted + accept, rows,
    )

  is_before = lambda now: now.lam < end - 1e-5
  begin = _begin(x / start[0], _half_log_snr(start), h_init, max_steps if trajectory else 0)
  done = jax.lax.while_loop(lambda now: is_before(now) & (now.tried < max_steps), attempt, begin)
  short = (is_before(done) | (grid[1][-1] == 0)) & (start[1] > 0)
  return _finish(denoise, grid, done, short, trajectory)


def _judge(now: Progress, low, high, rtol, atol, gains, accept_safety):
  """(accept, factor on the next step, errors) of the two estimates of a step."""
  bound = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(now.low)))
  inverse = 1 / (jnp.sqrt(jnp.mean(((low - high) / bound) ** 2)) + 1e-8)
  errors = jnp.where(now.tried == 0, inverse, now.errors).at[0].set(inverse)
  factor = 1 + jnp.arctan(jnp.prod(errors ** jnp.asarray(gains, errors.dtype)) - 1)
  accept = factor >= accept_safety
  return accept, factor, jnp.where(accept, errors[jnp.array([0, 0, 1])], errors)


def _half_log_snr(pair: Pair) -> jax.Array:
  return -jnp.log(pair[1] / pair[0])


def _pair_at(grid: Grid, lam: jax.Array) -> Pair:
  return pairs_at(grid, (jnp.ones_like(lam), jnp.exp(-lam)))


def _off_pure_noise(denoise, x, grid: Grid) -> tuple[Latents, Pair]:
  """x at the first pair with alpha > 0, and that pair."""
  here, there = pair_number(grid, 0), pair_number(grid, 1)
  jump = lambda: move(x, denoise(x, *here), here, there).astype(x.dtype)
  return jax.lax.cond(here[0] > 0, lambda: x, jump), pair_number(grid, jnp.where(here[0] > 0, 0, 1))


def _begin(y: Latents, lam: jax.Array, h_init: float, count: int) -> Progress:
  states, scalars = jnp.zeros((count, *y.shape), y.dtype), jnp.zeros(count, y.dtype)
  return Progress(
    y, y, lam, jnp.asarray(h_init, y.dtype), jnp.zeros(3, y.dtype), jnp.array(0), jnp.array(0),
    (states, states, scalars, scalars) if count else (),
  )


def _split(lam, t, end, eta: float) -> tuple[jax.Array, jax.Array]:
  """The noiseless target of a step from lam to t, at most `end`, and the noise to add."""
  if not eta:
    return t, jnp.zeros_like(t)
  one = jnp.ones_like(t)
  down, _ = ancestral((one, jnp.exp(-lam)), (one, jnp.exp(-t)), eta)
  target = jnp.minimum(end, -jnp.log(down))
  return target, jnp.sqrt(jnp.maximum(jnp.exp(-2 * t) - jnp.exp(-2 * target), 0))


def two_estimates(denoise: Denoiser, grid: Grid, y, lam, target, order: int):
  """(lower, higher order y at `target`, x_0 at `lam`), with `order` network calls.

  Orders 1 and 2, or 2 and 3 (Lu et al. 2022, DPM-Solver, appendix C).
  """
  h = target - lam
  sigma = lambda fraction: jnp.exp(-(lam + fraction * h))
  grow = lambda fraction: jnp.expm1(fraction * h)
  curve = lambda fraction: grow(fraction) / (fraction * h) - 1

  def clean(y, lam):
    a, s = _pair_at(grid, lam)
    return denoise(a * y, a, s).astype(y.dtype)

  x0 = clean(y, lam)
  first = (y - x0) / sigma(0)

  def change(fraction, slope=0.0):
    u = y - sigma(fraction) * (grow(fraction) * first + slope)
    return (u - clean(u, lam + fraction * h)) / sigma(fraction) - first

  whole = y - sigma(1) * grow(1) * first
  if order == 2:
    return whole, whole - sigma(1) * grow(1) * change(1 / 2), x0
  third = change(1 / 3)
  two_thirds = change(2 / 3, 2 * curve(2 / 3) * third)
  low = whole - sigma(1) * grow(1) * 3 / 2 * third
  return low, whole - sigma(1) * 3 / 2 * curve(1) * two_thirds, x0


def _finish(
  denoise: Callable, grid: Grid, done: Progress, short: jax.Array, trajectory: bool
) -> Latents | Trajectory:
  """Take the DDIM step to the grid's end if there is one left, and make the trajectory."""
  here, there = _pair_at(grid, done.lam), pair_number(grid, -1)
  x = here[0] * done.y
  step = lambda: move(x, denoise(x, *here), here, there).astype(x.dtype)
  sample = jax.lax.cond(short, step, lambda: x)
  if not trajectory:
    return sample
  states, x0, alphas, sigmas = done.rows
  rows = jnp.arange(len(alphas))
  kept = rows < jnp.minimum(done.accepted - jnp.where(short, 0, 1), len(rows) - 1)
  wide = lambda rows: rows.reshape(-1, *(1,) * x.ndim)
  return Trajectory(
    sample, jnp.where(wide(kept), states, sample),
    jnp.where(wide(rows < done.accepted), x0, sample),
    jnp.where(kept, alphas, there[0]), jnp.where(kept, sigmas, there[1]),
  )


DPM_ADAPTIVE = SamplerInfo(
  dpm_adaptive, 3, None, 'DPM-Solver-23 with adaptive steps of three calls', 'Lu et al. 2022'
)
PROBABILITY_FLOW = SamplerInfo(
  probability_flow, 5, None, 'Dormand-Prince 5(4), adaptive steps of six calls', 'Song et al. 2021'
)
