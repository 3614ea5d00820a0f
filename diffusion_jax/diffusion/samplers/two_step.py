"""Runge-Kutta samplers of the second order: two network calls a step, one where it ends clean.

A step from alpha = 0 or to sigma = 0 is DDIM's: there y = x / alpha or the slope is not finite.
"""

import math

import jax

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Churn,
  Keys,
  Pair,
  Trajectory,
  ancestral,
  epsilon,
  is_inner,
  log_midpoint,
  move,
  noise_source,
  straight,
  walk,
)
from diffusion_jax.types import Latents


def heun_step(denoise: Denoiser, x: Latents, here: Pair, there: Pair) -> tuple[Latents, Latents]:
  """(x at `there`, x_0 estimated at `here`): the trapezoidal rule on dy = eps dr."""
  x0 = denoise(x, *here)
  euler = move(x, x0, here, there)

  def correct():
    there_eps = epsilon(euler, denoise(euler, *there), there)
    return straight(x, (epsilon(x, x0, here) + there_eps) / 2, here, there)

  return jax.lax.cond(is_inner(here, there), correct, lambda: euler), x0


def midpoint_step(
  denoise: Denoiser, x: Latents, x0: Latents, here: Pair, there: Pair, target: Pair
) -> Latents:
  """x at `target`, a pair of alpha' and a sigma of at most sigma': the midpoint rule in log r."""

  def correct():
    middle = log_midpoint(here, there, target)
    x_middle = move(x, x0, here, middle)
    eps = epsilon(x_middle, denoise(x_middle, *middle), middle)
    return straight(x, eps, here, target)

  return jax.lax.cond(is_inner(here, target), correct, lambda: move(x, x0, here, target))


def heun(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
  trajectory: bool = False,
) -> Latents | Trajectory:
  """Heun's method with churn (Karras et al. 2022, algorithms 1 and 2).

  Args:
    s_churn, s_tmin, s_tmax, s_noise: as in `Churn`; without churn the method is deterministic.
  """
  churn = Churn(s_churn, s_tmin, s_tmax, s_noise).on(grid, noise_source(keys))

  def step(x, memory, here, there, index):
    x, here = churn(x, here, there, index)
    x, x0 = heun_step(denoise, x, here, there)
    return x, memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def dpm2(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
  trajectory: bool = False,
) -> Latents | Trajectory:
  """The midpoint rule, midpoints in log r (k-diffusion; cf. Lu et al. 2022, DPM-Solver-2).

  Args:
    s_churn, s_tmin, s_tmax, s_noise: as in `Churn`; without churn the method is deterministic.
  """
  churn = Churn(s_churn, s_tmin, s_tmax, s_noise).on(grid, noise_source(keys))

  def step(x, memory, here, there, index):
    x, here = churn(x, here, there, index)
    x0 = denoise(x, *here)
    return midpoint_step(denoise, x, x0, here, there, there), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def dpm2_ancestral(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, trajectory: bool = False,
) -> Latents | Trajectory:
  """`dpm2` to less than the wanted noise, then the rest as fresh noise (k-diffusion).

  Args:
    eta: share of the posterior's deviation that is added as noise; 0 is `dpm2`.
    s_noise: factor on that noise.
  """
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    x0 = denoise(x, *here)
    down, up = ancestral(here, there, eta)
    x = midpoint_step(denoise, x, x0, here, there, (there[0], down))
    return (x + s_noise * up * noise(index, x) if eta else x), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def flow_heun(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *, trajectory: bool = False
) -> Latents | Trajectory:
  """Heun's method in the time of a flow (Lipman et al. 2023; Esser et al. 2024).

  Averages the velocities dx = (alpha' - alpha) x_0 + (sigma' - sigma) eps at both ends; on a flow's
  grid that is (sigma' - sigma) (eps - x_0). Finite from alpha = 0.
  """
  del keys

  def step(x, memory, here, there, index):
    del index
    x0 = denoise(x, *here)
    velocity = lambda x, x0, at: (there[0] - here[0]) * x0 + (there[1] - here[1]) * epsilon(
      x, x0, at
    )
    first = velocity(x, x0, here)

    def correct():
      euler = x + first
      return x + (first + velocity(euler, denoise(euler, *there), there)) / 2

    return jax.lax.cond(there[1] > 0, correct, lambda: x + first), memory, x0

  return walk(step, x, grid, trajectory=trajectory)
