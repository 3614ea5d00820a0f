"""Stochastic samplers: the reverse SDE, Langevin dynamics, restarts, and distilled networks.

The score is (alpha x_0 - x) / sigma^2 (Efron 2011). A step to sigma = 0 returns alpha' x_0, one
from alpha = 0 takes the posterior.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.samplers.common import (
  Pair,
  SamplerInfo,
  Steps,
  added_deviation,
  ancestral,
  contraction,
  divide,
  intervals,
  is_inner,
  log_midpoint,
  move,
  pairs_at,
  scanned,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.diffusion.samplers.ode import heun_step
from diffusion_jax.types import Latents


def score(x: Latents, x0: Latents, pair: Pair) -> Latents:
  """Gradient of the log-density at x [b ...], given the estimate of x_0."""
  return divide(pair[0] * x0 - x, pair[1] ** 2)


def reverse_step(x: Latents, x0: Latents, here: Pair, there: Pair, z: Latents) -> Latents:
  """One step of `euler_maruyama`."""
  q = contraction(here, there)
  drift = 1 - divide(here[0], there[0])
  added = here[1] ** 2 * (1 - q) * (1 + q)
  stepped = x + drift * x + added * score(x, x0, here) + jnp.sqrt(added) * z
  return jnp.where(is_inner(here, there), stepped, there[0] * x0 + there[1] * z)


@scanned
def euler_maruyama(denoise, grid, noise):
  """Euler-Maruyama on dx = (f x - g^2 score) dt + g dw, run backwards (Song et al. 2021, eq. 6).

  Drift and noise are the forward chain's, -f dt = 1 - alpha / alpha', g^2 dt = sigma^2 - (alpha /
  alpha')^2 sigma'^2: the reverse diffusion sampler (eq. 46), x' = (2 - sqrt(1 - beta)) x + beta
  score + sqrt(beta) z for VP.
  """

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    return reverse_step(x, x0, here, there, noise(index, x)), carry, x0

  return Steps(step)


def langevin_step(x: Latents, gradient: Latents, size, z: Latents) -> Latents:
  """x + size gradient + sqrt(2 size) z; size [] or [b 1 ...]."""
  return x + size * gradient + jnp.sqrt(2 * size) * z


def _norms(values: Latents) -> jax.Array:
  """Norm of each example, [b 1 ...]."""
  return jnp.sqrt((values**2).sum(axis=tuple(range(1, values.ndim)), keepdims=True))


@scanned
def predictor_corrector(denoise, grid, noise, *, snr=0.16, corrections=1):
  """Langevin steps at each noise level, then a step of `euler_maruyama` (Song et al. 2021, alg. 1).

  A Langevin step has the size 2 (snr |z| / |score|)^2 of algorithm 4, norms per image rather than
  over the batch, without algorithm 5's factor 1 - beta for VP. In a few dimensions one image's
  norms vary too much for that. Noises (corrections + 1) i and on belong to step i. snr:
  signal-to-noise ratio. corrections: Langevin steps before each step, one network call each.
  """

  def step(x, carry, here, there, index):
    own_noise = lambda k: noise((corrections + 1) * index + k, x)

    def correct(x, k):
      gradient, z = score(x, denoise(x, *here), here), own_noise(k)
      size = 2 * (snr * _norms(z) / _norms(gradient)) ** 2
      return langevin_step(x, gradient, size, z).astype(x.dtype), None

    x, _ = jax.lax.scan(correct, x, jnp.arange(corrections))
    x0 = denoise(x, *here)
    return reverse_step(x, x0, here, there, own_noise(corrections)), carry, x0

  return Steps(step)


@scanned
def annealed_langevin(denoise, grid, noise, *, step_size=0.2, steps=100):
  """Langevin dynamics at each noise level in turn (Song & Ermon 2019, algorithm 1).

  x goes to the next level at fixed x / alpha; to sigma = 0 by a denoising step (Jolicoeur-Martineau
  et al. 2021), from alpha = 0 as alpha' x_0 + sigma' z. Noises (steps + 1) i and on belong to level
  i. step_size: alpha_i / sigma_i^2 of the paper, 2 of `langevin_step`'s sizes: its epsilon 2e-5
  over its last variance 0.01^2. steps: at each level, one network call each.
  """

  def step(x, carry, here, there, index):
    own_noise = lambda k: noise((steps + 1) * index + k, x)

    def settle(carry, k):
      x, _ = carry
      x0 = denoise(x, *here)
      size = step_size / 2 * here[1] ** 2
      new = langevin_step(x, score(x, x0, here), size, own_noise(k))
      return (new.astype(x.dtype), x0.astype(x.dtype)), None

    (x, x0), _ = jax.lax.scan(settle, (x, x), jnp.arange(steps))

    def leave():
      return there[0] * denoise(x, *here).astype(x.dtype) + there[1] * own_noise(steps)

    stay = lambda: divide(there[0], here[0]) * x
    return jax.lax.cond(is_inner(here, there), stay, leave), carry, x0

  return Steps(step)


@scanned
def dpmpp_sde(denoise, grid, noise, *, eta=1.0, s_noise=1.0):
  """DPM-Solver++(SDE) (k-diffusion): an ancestral step to the log-midpoint, its x_0 for the whole.

  A step's noises, 2 i and 2 i + 1, are of one Brownian path in sigma / alpha, as in k-diffusion:
  that makes the variance right to second order in the step, independent noise only to first. eta:
  fraction of the posterior's deviation added as noise. s_noise: factor on it.
  """

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    z = noise(2 * index, x) if eta else jnp.zeros_like(x)

    def at_middle():
      middle = log_midpoint(here, there)
      down, up = ancestral(here, middle, eta)
      x_middle = move(x, x0, here, (middle[0], down)) + s_noise * up * z
      return denoise(x_middle, *middle).astype(x.dtype), path_correlation(here, middle, there)

    used, shared = jax.lax.cond(
      is_inner(here, there), at_middle, lambda: (x0.astype(x.dtype), jnp.zeros_like(here[0]))
    )
    down, up = ancestral(here, there, eta)
    x = move(x, used, here, (there[0], down))
    if eta:
      z = shared * z + jnp.sqrt((1 - shared) * (1 + shared)) * noise(2 * index + 1, x)
      x = x + s_noise * up * z
    return x, carry, x0

  return Steps(step)


def path_correlation(here: Pair, middle: Pair, there: Pair) -> jax.Array:
  """Correlation of a Brownian path's increments from r to the middle and to r'."""
  r, r_middle, r_next = (divide(pair[1], pair[0]) for pair in (here, middle, there))
  return jnp.sqrt((r - r_middle) / (r - r_next))


@scanned
def restart(denoise, grid, noise, *, low=0.1, high=2.0, steps=6, repeats=2, s_noise=1.0):
  """Heun's method that goes `repeats` times from noise level `low` back up to `high`.

  Xu et al. 2023, algorithm 1 with one interval: at the pair nearest to `low`, noise lifts x to
  `high`, and `steps` Heun steps at karras levels return. The noise forgets earlier errors. low,
  high: sigma / alpha, clipped to the grid's. s_noise: factor on the noise.
  """
  starts, ends = _with_restarts(grid, low, high, steps, repeats)
  before = tuple(
    jnp.concatenate([start[:1], end[:-1]]) for start, end in zip(starts, ends, strict=True)
  )

  def step(x, carry, here, there, index, before):
    scale = jnp.where(here[0] == before[0], 1, divide(here[0], before[0]))
    x = scale * x + s_noise * added_deviation(here[1], scale * before[1]) * noise(index, x)
    x, x0 = heun_step(denoise, x, here, there, there)
    return x, carry, x0

  return Steps(step, (before,), ends=(starts, ends))


def _with_restarts(grid: Grid, low, high, steps: int, repeats: int) -> tuple[Pair, Pair]:
  """The grid's steps and `repeats * steps` more where it passes `low`: pairs of start and end."""
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


@scanned
def lcm(denoise, grid, noise):
  """Multistep consistency sampling: x' = alpha' f(x) + sigma' z (Song et al. 2023, algorithm 1).

  The denoiser is f, with f(x) = x at the least noise (Luo et al. 2023).
  """

  def step(x, carry, here, there, index):
    x0 = denoise(x, *here)
    return there[0] * x0 + there[1] * noise(index, x), carry, x0

  return Steps(step)


@scanned
def tcd(denoise, grid, noise, *, gamma=0.3):
  """Trajectory consistency: a jump to less noise than wanted, then noise (Zheng et al. 2024).

  It jumps to the pairs at time (1 - gamma) t: the grid's third part, or with atan2(sigma, alpha)
  for the time. gamma: 0 jumps to each next pair (DDIM), 1 to clean data (`lcm`).
  """
  alphas, sigmas, *of_grid = grid
  if of_grid:
    landing = of_grid[0]
  elif not gamma:
    landing = alphas[1:], sigmas[1:]
  else:
    angles = (1 - gamma) * jnp.arctan2(sigmas[1:], alphas[1:])
    landing = pairs_at(grid, (jnp.cos(angles), jnp.sin(angles)))

  def step(x, carry, here, there, index, landing):
    x0 = denoise(x, *here)
    scale = divide(there[0], landing[0])
    x = scale * move(x, x0, here, landing)
    return x + added_deviation(there[1], scale * landing[1]) * noise(index, x), carry, x0

  return Steps(step, (landing,))


DPMPP_SDE = SamplerInfo(
  dpmpp_sde, 2, 2, 'DPM-Solver++ for the reverse SDE', 'Lu et al. 2022', stochastic=True
)
EULER_MARUYAMA = SamplerInfo(
  euler_maruyama, 1, 1, 'Euler-Maruyama on the reverse SDE', 'Song et al. 2021', stochastic=True
)
PREDICTOR_CORRECTOR = SamplerInfo(
  predictor_corrector, None, 2,
  'Euler-Maruyama after a Langevin step', 'Song et al. 2021', stochastic=True,
)
ANNEALED_LANGEVIN = SamplerInfo(
  annealed_langevin, None, 100,
  'Langevin dynamics at each noise level', 'Song & Ermon 2019', stochastic=True,
)
RESTART = SamplerInfo(
  restart, 2, 2,
  'Heun that goes back up from sigma / alpha 0.1 to 2 twice', 'Xu et al. 2023', stochastic=True,
)
LCM = SamplerInfo(
  lcm, None, 1, 'multistep consistency, for distilled networks', 'Luo et al. 2023', stochastic=True
)
TCD = SamplerInfo(
  tcd, None, 1,
  'trajectory consistency, for distilled networks', 'Zheng et al. 2024', stochastic=True,
)
