"""Samplers on Gaussian mixtures, where the denoiser is exact and the right answer known.

What remains is the sampler's own error. All in float64.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.samplers import Grid, info, process_grid, sampler, spaced_levels
from diffusion_jax.errors import UserError

TWO_MODES = GaussianMixture(
  np.array([0.4, 0.6]), np.array([-1.0, 0.9]).reshape(2, 1, 1, 1), np.array([0.04, 0.09])
)
"""In one dimension, [b 1 1 1], where the probability-flow ODE keeps quantiles."""

GAUSSIAN = GaussianMixture(np.ones(1), np.zeros((1, 1, 1, 1)), np.array([0.25]))
"""N(0, 1/4), on which a step of a sampler is linear in x and in its noise."""

_ANGLES = 2 * np.pi * (np.arange(5) / 5 + 0.05)
FIVE_MODES = GaussianMixture(
  np.full(5, 0.2), 1.6 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1).reshape(5, 1, 1, 2),
  np.array([0.02, 0.04, 0.06, 0.04, 0.02]),
)
"""In the plane, [b 1 1 2], on a circle."""

FIRST_LEVEL, LAST_LEVEL = 80.0, 0.02
"""Noise levels sigma / alpha between which errors are measured, on a VP process."""

POINTS = 128
"""Quantiles that the error of a deterministic sampler is a mean over."""

PATHS, PATH_STEPS = 16, 24
"""Points that are followed, and steps."""

OF_LENGTH = ('heun_churn',)
"""Samplers that do another thing on a grid of more steps: their grid must not go on."""


class Paths(NamedTuple):
  """states [s n 2] of n points, from noise to data, at the pairs alphas [s] and sigmas [s]."""

  states: np.ndarray
  alphas: np.ndarray
  sigmas: np.ndarray


def cumulative(mixture: GaussianMixture, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
  """P(x_t <= x) [n] of a mixture in one dimension, diffused; x [n]."""
  weights, means, variances = (np.asarray(part, np.float64).reshape(-1) for part in mixture)
  spread = np.sqrt(alpha**2 * variances + sigma**2)
  return norm.cdf((x[:, None] - alpha * means) / spread) @ weights


def quantiles(
  mixture: GaussianMixture, shares: np.ndarray, alpha: float, sigma: float
) -> Float[np.ndarray, 'n']:
  """The x at which `cumulative` is shares [n], each in (0, 1): by bisection, to the last digit."""
  means = alpha * np.asarray(mixture.means).reshape(-1)
  reach = 40 * np.sqrt(alpha**2 * np.max(mixture.variances) + sigma**2)
  low = np.full(shares.shape, means.min() - reach)
  high = np.full(shares.shape, means.max() + reach)
  for _ in range(64):
    middle = (low + high) / 2
    below = cumulative(mixture, middle, alpha, sigma) < shares
    low, high = np.where(below, middle, low), np.where(below, high, middle)
  return (low + high) / 2


def going_on(steps: int, longest: int) -> Grid:
  """Grid on a VP process: `steps` Karras steps from the first to the last level, then more.

  With those beyond the last level it has `longest` steps, so that one compilation serves all step
  numbers; and no method lowers its order at the last level, where the grid does not end.
  """
  levels = spaced_levels(steps + 1, 'karras', LAST_LEVEL, FIRST_LEVEL)
  beyond = LAST_LEVEL * np.geomspace(1, 0.5, longest - steps + 1)[1:]
  levels = np.append(levels, beyond)
  scale = np.sqrt(1 + levels**2)
  return 1 / scale, levels / scale


def check_measurable(name: str) -> None:
  """Return whether `errors` has an answer for a sampler.

  Raises:
    UserError: for an unknown sampler, or one whose error does not fall with its number of steps.
  """
  sampler(name)
  if info(name).order is None or info(name).calls is None:
    raise UserError(
      f'sampler {name!r} has no error that falls with a chosen number of steps; leave it out of '
      'the drawing of errors.'
    )


def errors(name: str, calls: Sequence[int]) -> list[tuple[int, float]]:
  """(network calls, error) of a sampler for about each of the given numbers of calls.

  From an exact start at the first level to the last. Errors are exact distances to the diffused
  data there: of a deterministic sampler on TWO_MODES the mean over quantiles of |x - exact flow|
  (Wasserstein 1), of a stochastic one on GAUSSIAN the difference of the standard deviations
  (Wasserstein 2), that of the samples being known without drawing any.

  Raises:
    UserError: as in `check_measurable`.
  """
  check_measurable(name)
  of = info(name)
  counts = sorted({max(1, number // of.calls) for number in calls})
  measure = _stochastic if of.stochastic else _deterministic
  with jax.enable_x64(True):
    run = jax.jit(partial(sampler(name), trajectory=True), static_argnums=(0, 3))
    found = []
    for count in counts:
      grid = going_on(count, count if name in OF_LENGTH else counts[-1])
      states, sigmas, error = measure(run, grid, count)
      steps = np.flatnonzero(sigmas == grid[1][count])[-1]  # A restart passes it again.
      used = of.calls * int(steps + 1) + of.more_calls
      found.append((used, float(error(states[steps].ravel()))))
  return found


def _deterministic(run, grid: Grid, count: int):
  """(states, their sigmas, the error of the state at the grid's pair `count`)."""
  shares = (np.arange(POINTS) + 0.5) / POINTS
  place = lambda i: quantiles(TWO_MODES, shares, grid[0][i], grid[1][i])
  out = run(TWO_MODES.denoise, jnp.asarray(place(0)).reshape(-1, 1, 1, 1), grid, None)
  return out.states, out.sigmas, lambda x: np.abs(x - place(count)).mean()


def _draw(index, like):
  """Row i + 1 of the batch has the draw number i, which is 1, and no other noise."""
  here = jnp.arange(len(like)) == index + 1
  # A draw that no row has would go unnoticed.
  here = jnp.where(index + 1 < len(like), here, jnp.nan)
  return here.reshape(-1, 1, 1, 1).astype(like.dtype)


def _stochastic(run, grid: Grid, count: int):
  """As `_deterministic`; the batch is what the first noise and each draw contribute to x."""
  deviation = lambda i: np.sqrt(GAUSSIAN.variances[0] * grid[0][i] ** 2 + grid[1][i] ** 2)
  start = jnp.zeros((2 * len(grid[0]), 1, 1, 1)).at[0].set(deviation(0))
  out = run(GAUSSIAN.denoise, start, grid, _draw)
  return out.states, out.sigmas, lambda parts: abs(np.linalg.norm(parts) - deviation(count))


def paths(name: str, steps: int = PATH_STEPS, count: int = PATHS, seed: int = 0) -> Paths:
  """Return the paths of points from pure noise to FIVE_MODES; all samplers start alike.

  On the cosine process, with even steps in time.

  Raises:
    UserError: for an unknown sampler, or a number of steps or points below 1.
  """
  if count < 1:
    raise UserError(f'{count} paths cannot be drawn; choose at least 1.')
  with jax.enable_x64(True):
    grid = process_grid(processes.cosine(), steps)

    @jax.jit
    def follow(key):
      keys = jax.random.split(key, count + 1)
      start = jax.random.normal(keys[0], (count, 1, 1, 2), jnp.float64)
      return start, sampler(name)(FIVE_MODES.denoise, start, grid, keys[1:], trajectory=True)

    start, out = jax.tree.map(np.asarray, follow(jax.random.key(seed)))
  states = np.concatenate([start[None], out.states]).squeeze((2, 3))
  alphas, sigmas = map(np.asarray, grid)
  return Paths(states, np.append(alphas[0], out.alphas), np.append(sigmas[0], out.sigmas))


def field(
  points: Float[np.ndarray, 'h w 2'], alpha: float, sigma: float
) -> tuple[Float[np.ndarray, 'h w'], Float[np.ndarray, 'h w 2']]:
  """(density, score) of FIVE_MODES, diffused, at points of the plane."""
  with jax.enable_x64(True):
    x = np.asarray(points, np.float64).reshape(-1, 1, 1, 2)
    density, score = map(np.asarray, _field(x, alpha, sigma))
  return density.reshape(points.shape[:2]), score.reshape(points.shape)


@jax.jit
def _field(x, alpha, sigma):
  mixture = FIVE_MODES.diffused(alpha, sigma)
  return jnp.exp(mixture.log_density(x)), mixture.score(x)
