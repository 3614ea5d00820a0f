"""Samplers of the first order, one network call a step, and of the second, two calls.

All are `sampler(denoise, x, grid, keys, **options)`: x [b ...] is noise of the grid's first sigma,
or data noised to its first pair, and the result is at its last pair. All take `trajectory=True`. A
step of the second order from alpha = 0 or to sigma = 0 is DDIM's: there y = x / alpha or the slope
is not finite.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Churn,
  Keys,
  Pair,
  SamplerInfo,
  Trajectory,
  ancestral,
  as_arrays,
  combine,
  contraction,
  epsilon,
  intervals,
  is_inner,
  log_midpoint,
  move,
  moves,
  noise_source,
  real_steps,
  straight,
  walk,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

ADAMS_BASHFORTH = np.array(
  [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
   [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)
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
    eta: fraction of the posterior's deviation that is added as noise.
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

  def step(x, carry, here, there, index, landing):
    del there
    x0 = denoise(x, *here)
    x0, free = x0 if keep_epsilon and isinstance(x0, tuple) else (x0, x0)
    down, up = ancestral(here, landing, eta)
    x = move(x, free, here, (landing[0], down)) + landing[0] * (x0 - free)
    return (x + s_noise * up * noise(index, x) if eta else x), carry, x0

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

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    x0, fraction = x0 if variance == 'learned' else (x0, float(variance == 'fixed_large'))
    q = contraction(here, there)
    small = jnp.where(there[1] > 0, there[1], 1)
    large = here[1] * jnp.hypot(*there) / jnp.hypot(*here)
    deviation = jnp.sqrt((1 - q) * (1 + q)) * small ** (1 - fraction) * large**fraction
    x = move(x, x0, here, (there[0], there[1] * q))
    return x + jnp.where(there[1] > 0, deviation, 0) * noise(index, x), carry, x0

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

  def step(x, carry, here, there, index):
    x, here = churn(x, here, there, index)
    x0 = denoise(x, *here)
    return move(x, x0, here, there), carry, x0

  return walk(step, x, grid, trajectory=trajectory)


def heun_step(denoise: Denoiser, x: Latents, here: Pair, there: Pair) -> tuple[Latents, Latents]:
  """Return (x at `there`, x_0 estimated at `here`): the trapezoidal rule on dy = eps dr."""
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

  def step(x, carry, here, there, index):
    x, here = churn(x, here, there, index)
    x, x0 = heun_step(denoise, x, here, there)
    return x, carry, x0

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

  def step(x, carry, here, there, index):
    x, here = churn(x, here, there, index)
    x0 = denoise(x, *here)
    return midpoint_step(denoise, x, x0, here, there, there), carry, x0

  return walk(step, x, grid, trajectory=trajectory)


def dpm2_ancestral(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, trajectory: bool = False,
) -> Latents | Trajectory:
  """`dpm2` to less than the wanted noise, then the rest as fresh noise (k-diffusion).

  Args:
    eta: fraction of the posterior's deviation that is added as noise; 0 is `dpm2`.
    s_noise: factor on that noise.
  """
  noise = noise_source(keys)

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    down, up = ancestral(here, there, eta)
    x = midpoint_step(denoise, x, x0, here, there, (there[0], down))
    return (x + s_noise * up * noise(index, x) if eta else x), carry, x0

  return walk(step, x, grid, trajectory=trajectory)


def flow_heun(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *, trajectory: bool = False
) -> Latents | Trajectory:
  """Heun's method in the time of a flow (Lipman et al. 2023; Esser et al. 2024).

  Averages the velocities dx = (alpha' - alpha) x_0 + (sigma' - sigma) eps at both ends; on a flow's
  grid that is (sigma' - sigma) (eps - x_0). Finite from alpha = 0.
  """
  del keys

  def step(x, carry, here, there, index):
    del index
    x0 = denoise(x, *here)
    velocity = lambda x, x0, at: (there[0] - here[0]) * x0 + (there[1] - here[1]) * epsilon(
      x, x0, at
    )
    first = velocity(x, x0, here)

    def correct():
      euler = x + first
      return x + (first + velocity(euler, denoise(euler, *there), there)) / 2

    return jax.lax.cond(there[1] > 0, correct, lambda: x + first), carry, x0

  return walk(step, x, grid, trajectory=trajectory)


def pndm(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  runge_kutta: bool = True, average: str = 'epsilon', trajectory: bool = False,
) -> Latents | Trajectory:
  """Pseudo numerical methods (Liu et al. 2022, algorithm 2): Adams-Bashforth weights on eps.

  The weights are those of equal steps of time; the move, their transfer part, is DDIM's.

  Args:
    runge_kutta: start with three steps of the pseudo Runge-Kutta method, four calls each, their
      midpoints those of the grid (its third part [n 2]: the ends of the first and second moves), or
      else halfway in log-SNR; otherwise (PLMS) with one step of improved Euler, two calls.
    average: what the weights average, 'epsilon' or, of variance-preserving processes,
      'v_prediction' = alpha eps - sigma x_0, whose mean is read as v where the step starts.

  Raises:
    UserError: for another average.
  """
  if average not in ('epsilon', 'v_prediction'):
    raise UserError(f'average of pndm is {average!r}; choose epsilon or v_prediction.')
  del keys
  here, there = intervals(grid)
  rows = jnp.clip(jnp.cumsum(moves(here, there)) - 1, 0, 3)
  middles = grid[2] if len(grid) > 2 else jax.tree.map(
    lambda part: jnp.stack([part, part], axis=1), jax.vmap(log_midpoint)(here, there)
  )
  of_v = average == 'v_prediction'

  def value(x, x0, pair):
    eps = epsilon(x, x0, pair)
    return (pair[0] * eps - pair[1] * x0 if of_v else eps).astype(x.dtype)

  def step(x, past, here, there, index, row, middle):
    del index
    at = lambda x, pair: value(x, denoise(x, *pair), pair)
    to = lambda mean, pair: straight(x, here[0] * mean + here[1] * x if of_v else mean, here, pair)
    x0 = denoise(x, *here)
    first = value(x, x0, here)
    values = (first, *past)

    def improved_euler():
      return (first + at(to(first, there), there)) / 2

    def classical():
      before, after = ((middle[0][i], middle[1][i]) for i in (0, 1))
      second = at(to(first, before), after)
      third = at(to(second, after), after)
      fourth = at(to(third, there), there)
      return (first + 2 * second + 2 * third + fourth) / 6

    starts = (row < (3 if runge_kutta else 1)) & is_inner(here, there)
    start = classical if runge_kutta else improved_euler
    weights = jnp.asarray(ADAMS_BASHFORTH, x.dtype)[row]
    mean = jax.lax.cond(starts, start, lambda: combine(weights, values))
    moved = jnp.where(here[0] > 0, to(mean, there), move(x, x0, here, there))
    return moved, values[:-1], x0

  carry = lambda x: (jnp.zeros_like(x),) * 3
  return walk(step, x, grid, (rows, middles), carry=carry, trajectory=trajectory)


DDIM = SamplerInfo(ddim, 1, 1, 'DDIM, eta = 0; eps follows a clipped x_0', 'Song et al. 2021')
DDPM = SamplerInfo(
  ddpm, 1, 1,
  "ancestral, the posterior's variance, or a learned one", 'Ho et al. 2020', stochastic=True,
)
DDPM_LARGE = SamplerInfo(
  partial(ddpm, variance='fixed_large'), 1, 1,
  'ancestral, variance beta_t', 'Ho et al. 2020', stochastic=True,
)
EULER = SamplerInfo(euler, 1, 1, 'Euler on the probability-flow ODE', 'Karras et al. 2022')
EULER_ANCESTRAL = SamplerInfo(
  partial(ddim, eta=1.0), 1, 1,
  'Euler with fresh noise; DDIM, eta = 1', 'Song et al. 2021', stochastic=True,
)
HEUN = SamplerInfo(heun, 2, 2, 'trapezoidal rule in sigma / alpha', 'Karras et al. 2022')
EDM_CHURN = dict(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
HEUN_CHURN = SamplerInfo(
  partial(heun, **EDM_CHURN), 1, 2,
  'Heun with noise added and removed', 'Karras et al. 2022', stochastic=True,
)
DPM2 = SamplerInfo(dpm2, 2, 2, 'midpoint rule, midpoints in log-SNR', 'Lu et al. 2022')
DPM2_ANCESTRAL = SamplerInfo(
  dpm2_ancestral, 2, 2, 'dpm2 with fresh noise', 'Lu et al. 2022', stochastic=True
)
FLOW_EULER = SamplerInfo(
  ddim, 1, 1, 'Euler in the time of a flow; equals ddim', 'Lipman et al. 2023'
)
FLOW_HEUN = SamplerInfo(
  flow_heun, 2, 2, 'trapezoidal rule in the time of a flow', 'Lipman et al. 2023'
)
PLMS = SamplerInfo(
  partial(pndm, runge_kutta=False), 2, 1,
  'pseudo multistep of eps; one call more in the first step', 'Liu et al. 2022', more_calls=1,
)
PNDM = SamplerInfo(
  pndm, 2, 1, 'pseudo multistep of eps; in three steps four calls, midpoints in log-SNR',
  'Liu et al. 2022', more_calls=9,
)
