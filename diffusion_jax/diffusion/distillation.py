"""Distillation: a student learns to do in few steps what a frozen teacher does in many.

  consistency  the end of the teacher's path from any level  Song et al. 2023; Luo et al. 2023
  progressive  two of the teacher's steps in one             Salimans & Ho 2022, algorithm 2
  mean_flow    the mean velocity between two times           Geng et al. 2025

The teacher steps by DDIM, so that a student of any prediction and process can have any teacher.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.losses import pseudo_huber
from diffusion_jax.diffusion.noise import Level, NoiseSchedule
from diffusion_jax.diffusion.objective import QUANTILES, Losses
from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.diffusion.samplers import Grid
from diffusion_jax.diffusion.samplers.common import move
from diffusion_jax.types import Latents, PerExample

Estimate = Callable[[Latents, PerExample, PerExample], Latents]
"""(x [b ...], alpha [b], sigma [b]) -> the estimate of x_0 [b ...]."""

Velocity = Callable[[Latents, PerExample, PerExample], Latents]
"""(x [b ...], t [b], t - r [b]) -> the mean velocity from r to t [b ...]."""

Pair = tuple[PerExample, PerExample]


class Draws(NamedTuple):
  """A batch x_0 [b ...], the noise [b ...] drawn for it, and a key for what else is drawn."""

  x0: Latents
  noise: Latents
  key: jax.Array


def _at(grid: Grid, index: jax.Array) -> Pair:
  return tuple(jnp.asarray(part, jnp.float32)[index] for part in grid[:2])


def _noised(draws: Draws, pair: Pair) -> Latents:
  alpha, sigma = (expand(part, draws.x0) for part in pair)
  return alpha * draws.x0 + sigma * draws.noise


def _moved(x: Latents, x0: Latents, here: Pair, there: Pair) -> Latents:
  """One step of DDIM from levels [b] to levels [b]."""
  wide = lambda pair: tuple(expand(part, x) for part in pair)
  return move(x, x0, wide(here), wide(there))


def _level(noise: NoiseSchedule, pair: Pair) -> Level:
  alpha, sigma = pair
  return Level(alpha, sigma, noise.label(alpha, sigma), noise.time_of(alpha, sigma))


def _mean(values: Latents) -> PerExample:
  return values.reshape(len(values), -1).mean(axis=1)


def _random_step(draws: Draws, steps: int) -> jax.Array:
  """Return the number of one of so many steps for each example, int32 [b]."""
  return jax.random.randint(draws.key, (len(draws.x0),), 0, steps)


def consistency(
  student: Estimate, teacher: Estimate, draws: Draws, noise: NoiseSchedule, grid: Grid,
  delta: float,
) -> Losses:
  """The student's estimates at two neighbouring levels of the teacher's path agree.

  Luo et al. 2023, algorithm 1, with N + 1 levels of the grid, and no average of the student's
  parameters as the target (Song & Dhariwal 2024, section 3.2), which is taken as constant. At the
  last level, without noise, the target is the teacher's own end, so that f(x) = x there holds by
  construction. delta: of the pseudo-Huber error sqrt(d^2 + delta^2) - delta of each value.
  """
  index = _random_step(draws, len(grid[0]) - 1)
  here, there = _at(grid, index), _at(grid, index + 1)
  x = _noised(draws, here)
  nearer = jax.lax.stop_gradient(_moved(x, teacher(x, *here), here, there))
  clean = expand(there[1] == 0, x)
  # At sigma = 0 an estimate may divide by it: any other level is asked, and not used.
  level = tuple(jnp.where(there[1] == 0, *pair) for pair in zip(here, there, strict=True))
  wanted = jnp.where(
    clean, divide(nearer, expand(there[0], x)), jax.lax.stop_gradient(student(nearer, *level))
  )
  estimate = student(x, *here)
  error = _mean((estimate - wanted) ** 2)
  # Divided, so that delta does not scale the gradient.
  loss = pseudo_huber(estimate, wanted, jnp.asarray(delta)) / (2 * delta)
  return Losses(loss, error, _level(noise, here))


def progressive(
  student: Estimate, teacher: Estimate, draws: Draws, noise: NoiseSchedule, grid: Grid
) -> Losses:
  """One step of the student ends where two steps of the teacher do.

  grid: of the teacher, of twice as many steps as the student. The target is the x_0 whose DDIM step
  leads there; the weight is max(SNR, 1), the truncated SNR of section 4.
  """
  index = 2 * _random_step(draws, (len(grid[0]) - 1) // 2)
  here, middle, there = (_at(grid, index + steps) for steps in range(3))
  x = _noised(draws, here)
  half = _moved(x, teacher(x, *here), here, middle)
  end = _moved(half, teacher(half, *middle), middle, there)
  keep = expand(there[1] / here[1], x)
  wanted = divide(end - keep * x, expand(there[0], x) - keep * expand(here[0], x))
  error = _mean((student(x, *here) - jax.lax.stop_gradient(wanted)) ** 2)
  ratio = divide(here[0], here[1]) ** 2
  return Losses(jnp.maximum(ratio, 1) * error, error, _level(noise, here))


def derivative(function: Callable, at: tuple, along: tuple) -> jax.Array:
  """Return the derivative of a function of arrays along a direction, as `jax.jvp` does.

  By reverse mode twice, the second of the first, which is linear in what it is given: layers with
  derivatives of their own have none in forward mode.
  """
  value, pull_back = jax.vjp(function, *at)
  _, push_forward = jax.vjp(pull_back, jnp.zeros_like(value))
  return push_forward(along)[0]


def mean_flow(
  student: Velocity, fixed: Velocity, teacher: Estimate, draws: Draws, noise: NoiseSchedule, *,
  jumps: float = 0.5, mean: float = -0.4, std: float = 1.0, floor: float = 1e-3,
) -> Losses:
  """The student's mean velocity over [r, t] obeys d/dt ((t - r) u) = v along the teacher's path.

  Geng et al. 2025, algorithm 1 and eq. 10: the target is v - (t - r) du/dt, taken as constant, with
  the derivative along (v, 1) at fixed r, and the weight is 1 / (error + floor) (their p = 1). v is
  the teacher's, of which theirs, eps - x_0, is an unbiased but noisier estimate. On the flow alone,
  where x = (1 - t) x_0 + t eps.

  Args:
    fixed: the student as a constant, for the target.
    jumps: fraction of the examples with r < t; for the others u is the velocity itself.
    mean, std: of the logit-normal times, of which the larger is t.
  """
  key_times, key_jumps = jax.random.split(draws.key)
  u = jax.random.uniform(key_times, (2, len(draws.x0)))
  first, second = QUANTILES['logit_normal'](u, mean=mean, std=std)
  t = jnp.maximum(first, second)
  apart = jax.random.bernoulli(key_jumps, jumps, t.shape)
  interval = jnp.where(apart, jnp.abs(first - second), 0.0)
  pair = 1 - t, t
  x = _noised(draws, pair)
  velocity = jax.lax.stop_gradient((x - teacher(x, *pair)) / expand(t, x))
  ones = jnp.ones_like(t)
  change = derivative(fixed, (x, t, interval), (velocity, ones, ones))
  wanted = jax.lax.stop_gradient(velocity - expand(interval, x) * change)
  error = _mean((student(x, t, interval) - wanted) ** 2)
  loss = error / jax.lax.stop_gradient(error + floor)
  return Losses(loss, error, Level(*pair, noise.label(*pair), t))
