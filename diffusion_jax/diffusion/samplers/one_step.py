"""Samplers of the first order: one network call a step, nothing remembered.

All are `sampler(denoise, x, grid, keys, **options)`: x [b ...] is noise of the grid's first sigma,
or data noised to its first pair, and the result is at its last pair. All take `trajectory=True`.
"""

import math

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.grids import Grid
from diffusion_jax.diffusion.samplers.steps import (
  Churn,
  Keys,
  Trajectory,
  ancestral,
  as_arrays,
  contraction,
  divide,
  epsilon,
  intervals,
  move,
  noise_source,
  real_steps,
  walk,
)
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

VARIANCES = ('fixed_small', 'fixed_large', 'learned')


def ddim(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 0.0, s_noise: float = 1.0, keep_epsilon: bool = False, trajectory: bool = False,
) -> Latents | Trajectory:
  """DDIM (Song et al. 2021, eq. 12 and 16).

  eta = 0 is also Euler on the probability-flow ODE, in noise levels as in the time of a flow, and
  DPM-Solver++(1); eta = 1 is DDPM's posterior and k-diffusion's ancestral Euler. A step lands where
  the grid says (its third part), or else where the next one starts.

  Args:
    eta: share of the posterior's deviation that is added as noise.
    s_noise: factor on that noise.
    keep_epsilon: where the estimate of x_0 is clipped, eps is that of the estimate before, as in
      diffusers; `denoise` then returns both (`guidance.static_threshold`). Otherwise eps is what
      the clipped x_0 leaves of x, and a step from a pair to itself changes nothing.
  """
  noise = noise_source(keys)
  x, grid = as_arrays(x, grid)
  here, there = intervals(grid)
  landing = grid[2] if len(grid) > 2 else there
  taken = real_steps(here, there) if keep_epsilon else None

  def step(x, memory, here, there, index, landing):
    del there
    x0 = denoise(x, *here)
    x0, free = x0 if keep_epsilon and isinstance(x0, tuple) else (x0, x0)
    down, up = ancestral(here, landing, eta)
    x = move(x, free, here, (landing[0], down)) + landing[0] * (x0 - free)
    return (x + s_noise * up * noise(index, x) if eta else x), memory, x0

  return walk(step, x, grid, (landing,), taken=taken, trajectory=trajectory)


def ddpm(
  denoise, x: Latents, grid: Grid, keys: Keys, *,
  variance: str = 'fixed_small', trajectory: bool = False,
) -> Latents | Trajectory:
  """Ancestral sampling: the posterior's mean and a variance (Ho et al. 2020, eq. 7 and 11).

  The last step, to sigma = 0, adds no noise.

  Args:
    variance: of a step's noise. fixed_small: the posterior's, right for data of no variance.
      fixed_large: right for data N(0, 1); beta_t for a variance-preserving process. learned:
      denoise returns (x_0, f), and the variance is fixed_large^f fixed_small^(1-f), f in [0, 1]
      and of x_0's shape (Nichol & Dhariwal 2021, eq. 15).

  Raises:
    UserError: for an unknown variance.
  """
  if variance not in VARIANCES:
    raise UserError(f'variance of ddpm is {variance!r}; choose one of {", ".join(VARIANCES)}.')
  noise = noise_source(keys)

  def step(x, memory, here, there, index):
    x0 = denoise(x, *here)
    x0, share = x0 if variance == 'learned' else (x0, float(variance == 'fixed_large'))
    q = contraction(here, there)
    small = jnp.where(there[1] > 0, there[1], 1)
    large = here[1] * jnp.hypot(*there) / jnp.hypot(*here)
    deviation = jnp.sqrt((1 - q) * (1 + q)) * small ** (1 - share) * large**share
    x = move(x, x0, here, (there[0], there[1] * q))
    return x + jnp.where(there[1] > 0, deviation, 0) * noise(index, x), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def euler(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
  trajectory: bool = False,
) -> Latents | Trajectory:
  """Euler steps in sigma / alpha with churn (Karras et al. 2022, algorithm 2 without correction).

  Args:
    s_churn, s_tmin, s_tmax, s_noise: as in `Churn`; without churn the method is deterministic.
  """
  churn = Churn(s_churn, s_tmin, s_tmax, s_noise).on(grid, noise_source(keys))

  def step(x, memory, here, there, index):
    x, here = churn(x, here, there, index)
    x0 = denoise(x, *here)
    return move(x, x0, here, there), memory, x0

  return walk(step, x, grid, trajectory=trajectory)


def ddim_inversion(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  iterations: int = 1, trajectory: bool = False,
) -> Latents | Trajectory:
  """From data back to the noise that DDIM turns into them (Dhariwal & Nichol 2021, appendix F).

  Runs the grid backwards: x is at its last pair, the result at its first. A step solves x' =
  alpha' x_0 + sigma' eps for eps, the noise that the network sees in x' at the noisier pair (Mokady
  et al. 2023, section 3), by a fixed point that starts with x' = x (Pan et al. 2023).

  Args:
    iterations: of the fixed point, one network call each. 1 is the usual inversion, of the first
      order; with more the round trip becomes exact.
  """
  del keys

  def step(x, memory, here, there, index):
    del index

    def solve(guess):
      x0 = denoise(guess, *there)
      scale = divide(there[0], here[0])
      by_noise = scale * x + (there[1] - scale * here[1]) * epsilon(guess, x0, there)
      # At alpha' = 0 the noise seen in x' is x' itself and says nothing of x.
      by_data = divide(there[1], here[1]) * (x - here[0] * x0)
      return jnp.where(there[0] > 0, by_noise, by_data), x0

    if iterations == 1:
      x, x0 = solve(x)
    else:
      again = lambda _, guess: solve(guess)[0]
      x, x0 = solve(jax.lax.fori_loop(0, iterations - 1, again, x))
    return x, memory, x0

  return walk(step, x, (grid[0][::-1], grid[1][::-1]), trajectory=trajectory)
