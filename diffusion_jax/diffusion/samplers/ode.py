"""Samplers of the first order, one network call a step, and of the second, two calls.

From alpha = 0 or to sigma = 0, where y = x / alpha or the slope is infinite, a step is DDIM's.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax import registry
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Pair,
  Sampler,
  SamplerInfo,
  Steps,
  ancestral,
  contraction,
  divide,
  epsilon,
  intervals,
  is_inner,
  log_midpoint,
  move,
  pair_between,
  real_steps,
  scanned,
  step_count,
  straight,
)
from diffusion_jax.types import Latents

VARIANCES = ('fixed_small', 'fixed_large', 'learned')

Method = Callable[[Denoiser, Latents, Pair, Pair, Pair], tuple[Latents, Latents]]
"""(denoise, x, here, there, target) -> (x at `target`, x_0 estimated at `here`): a step without
noise to a pair of there's alpha, and its sigma or less."""


@scanned
def ddim(denoise, grid, noise, *, eta=0.0, s_noise=1.0, keep_epsilon=False):
  """DDIM (Song et al. 2021, eq. 12 and 16); steps end at the grid's third part, or the next pair.

  eta = 0 is also Euler on the probability-flow ODE, in noise levels as in the time of a flow, and
  DPM-Solver++(1); eta = 1 is DDPM's posterior and k-diffusion's ancestral Euler.

  Args:
    eta: fraction of the posterior's deviation that is added as noise.
    s_noise: factor on that noise.
    keep_epsilon: where x_0 is clipped, take eps from the estimate before, as diffusers; `denoise`
      then returns both (`denoiser.static_threshold`). Otherwise eps is what the clipped x_0 leaves
      of x, and a step from a pair to itself changes nothing.
  """
  here, there = intervals(grid)
  landing = grid[2] if len(grid) > 2 else there

  def step(x, carry, here, there, index, landing):
    del there
    x0 = denoise(x, *here)
    x0, free = x0 if keep_epsilon and isinstance(x0, tuple) else (x0, x0)
    down, up = ancestral(here, landing, eta)
    x = move(x, free, here, (landing[0], down)) + landing[0] * (x0 - free)
    return (x + s_noise * up * noise(index, x) if eta else x), carry, x0

  return Steps(step, (landing,), taken=real_steps(here, there) if keep_epsilon else None)


@scanned
def ddpm(denoise, grid, noise, *, variance='fixed_small'):
  """Ancestral sampling: the posterior's mean and a variance (Ho et al. 2020, eq. 7 and 11).

  The last step, to sigma = 0, adds no noise. variance: fixed_small, the posterior's, right for data
  of no variance; fixed_large, right for data N(0, 1), beta_t for VP; learned: denoise returns (x_0,
  f), and it is fixed_large^f fixed_small^(1-f), f in [0, 1] of x_0's shape (Nichol & Dhariwal 2021,
  eq. 15).
  """
  registry.check(VARIANCES, variance, 'variance of ddpm')

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    x0, fraction = x0 if variance == 'learned' else (x0, float(variance == 'fixed_large'))
    q = contraction(here, there)
    small = jnp.where(there[1] > 0, there[1], 1)
    large = here[1] * jnp.hypot(*there) / jnp.hypot(*here)
    deviation = jnp.sqrt((1 - q) * (1 + q)) * small ** (1 - fraction) * large**fraction
    x = move(x, x0, here, (there[0], there[1] * q))
    return x + jnp.where(there[1] > 0, deviation, 0) * noise(index, x), carry, x0

  return Steps(step)


def with_churn(method: Method) -> Sampler:
  """Make a sampler whose steps first add noise (Karras et al. 2022, algorithm 2).

  s_churn: sum over the steps of the fraction by which each first raises the noise level, at most
  sqrt(2) - 1 each, 0 for none. s_tmin, s_tmax: noise levels of churn. s_noise: factor on its noise.
  """

  @scanned
  def sampler(denoise, grid, noise, *, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    fraction = jnp.minimum(s_churn / step_count(grid), math.sqrt(2) - 1)

    def churned(x, here, there, z):
      (a, s), gamma = here, fraction.astype(x.dtype)
      gamma = jnp.where((s_tmin * a <= s) & (s <= s_tmax * a), gamma, 0)  # False where alpha = 0.
      raised = (1 + gamma) * s
      # sqrt(raised^2 - s^2), whose difference may round to below 0 where there is no churn.
      x = x + s_noise * s * jnp.sqrt(gamma * (2 + gamma)) * z
      scale = jnp.where(gamma > 0, divide(pair_between(here, there, (a, raised))[0], a), 1)
      return scale * x, (scale * a, scale * raised)

    def step(x, carry, here, there, index):
      if s_churn:
        x, here = churned(x, here, there, noise(index, x))
      x, x0 = method(denoise, x, here, there, there)
      return x, carry, x0

    return Steps(step)

  return sampler


def with_fresh_noise(method: Method) -> Sampler:
  """Make a sampler that goes to less than the wanted noise, then adds the rest (k-diffusion).

  eta: fraction of the posterior's deviation added as noise, 0 for the method itself. s_noise:
  factor.
  """

  @scanned
  def sampler(denoise, grid, noise, *, eta=1.0, s_noise=1.0):
    def step(x, carry, here, there, index):
      down, up = ancestral(here, there, eta)
      x, x0 = method(denoise, x, here, there, (there[0], down))
      return (x + s_noise * up * noise(index, x) if eta else x), carry, x0

    return Steps(step)

  return sampler


def euler_step(denoise, x, here, there, target):
  """Euler's method on dy = eps dr."""
  del there
  x0 = denoise(x, *here)
  return move(x, x0, here, target), x0


def heun_step(denoise, x, here, there, target):
  """The trapezoidal rule on dy = eps dr (Karras et al. 2022, algorithm 1)."""
  del there
  x0 = denoise(x, *here)
  euler = move(x, x0, here, target)

  def correct():
    next_eps = epsilon(euler, denoise(euler, *target), target)
    return straight(x, (epsilon(x, x0, here) + next_eps) / 2, here, target)

  return jax.lax.cond(is_inner(here, target), correct, lambda: euler), x0


def midpoint_step(denoise, x, here, there, target):
  """The midpoint rule in log r (k-diffusion; cf. Lu et al. 2022, DPM-Solver-2)."""
  x0 = denoise(x, *here)

  def correct():
    middle = log_midpoint(here, there, target)
    x_middle = move(x, x0, here, middle)
    eps = epsilon(x_middle, denoise(x_middle, *middle), middle)
    return straight(x, eps, here, target)

  return jax.lax.cond(is_inner(here, target), correct, lambda: move(x, x0, here, target)), x0


def two_stage_step(denoise, x, here, there, target):
  """DPM-Solver++(2S) (Lu et al. 2022, DPM-Solver++, algorithm 1 with r = 1/2)."""
  x0 = denoise(x, *here)

  def at_middle():
    middle = log_midpoint(here, there, target)
    return denoise(move(x, x0, here, middle), *middle).astype(x.dtype)

  used = jax.lax.cond(is_inner(here, target), at_middle, lambda: x0.astype(x.dtype))
  return move(x, used, here, target), x0


euler, heun, dpm2 = with_churn(euler_step), with_churn(heun_step), with_churn(midpoint_step)
dpm2_ancestral = with_fresh_noise(midpoint_step)
dpmpp_2s_ancestral = with_fresh_noise(two_stage_step)


@scanned
def flow_heun(denoise, grid, noise):
  """Heun's method in the time of a flow (Lipman et al. 2023; Esser et al. 2024).

  Averages dx = (alpha' - alpha) x_0 + (sigma' - sigma) eps at both ends, finite at alpha = 0; on a
  flow's grid that is (sigma' - sigma) (eps - x_0).
  """

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    d_alpha, d_sigma = there[0] - here[0], there[1] - here[1]
    velocity = lambda x, x0, at: d_alpha * x0 + d_sigma * epsilon(x, x0, at)
    first = velocity(x, x0, here)

    def correct():
      euler = x + first
      return x + (first + velocity(euler, denoise(euler, *there), there)) / 2

    return jax.lax.cond(there[1] > 0, correct, lambda: x + first), carry, x0

  return Steps(step)


EDM_CHURN = dict(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)

DDIM = SamplerInfo(ddim, 1, 1, 'DDIM, eta = 0; eps follows a clipped x_0', 'Song et al. 2021')
DDPM = SamplerInfo(
  ddpm, 1, 1, "ancestral, the posterior's variance, or a learned one", 'Ho et al. 2020',
  stochastic=True,
)
DDPM_LARGE = SamplerInfo(
  partial(ddpm, variance='fixed_large'), 1, 1, 'ancestral, variance beta_t', 'Ho et al. 2020',
  stochastic=True,
)
EULER = SamplerInfo(euler, 1, 1, 'Euler on the probability-flow ODE', 'Karras et al. 2022')
EULER_ANCESTRAL = SamplerInfo(
  partial(ddim, eta=1.0), 1, 1, 'Euler with fresh noise; DDIM, eta = 1', 'Song et al. 2021',
  stochastic=True,
)
HEUN = SamplerInfo(heun, 2, 2, 'trapezoidal rule in sigma / alpha', 'Karras et al. 2022')
HEUN_CHURN = SamplerInfo(
  partial(heun, **EDM_CHURN), 1, 2, 'Heun with noise added and removed', 'Karras et al. 2022',
  stochastic=True,
)
DPM2 = SamplerInfo(dpm2, 2, 2, 'midpoint rule, midpoints in log-SNR', 'Lu et al. 2022')
DPM2_ANCESTRAL = SamplerInfo(
  dpm2_ancestral, 2, 2, 'dpm2 with fresh noise', 'Lu et al. 2022', stochastic=True
)
DPMPP_2S_ANCESTRAL = SamplerInfo(
  dpmpp_2s_ancestral, 2, 2, 'DPM-Solver++(2S) with fresh noise', 'Lu et al. 2022', stochastic=True
)
FLOW_EULER = SamplerInfo(
  ddim, 1, 1, 'Euler in the time of a flow; equals ddim', 'Lipman et al. 2023'
)
FLOW_HEUN = SamplerInfo(
  flow_heun, 2, 2, 'trapezoidal rule in the time of a flow', 'Lipman et al. 2023'
)
