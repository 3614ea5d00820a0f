"""Distances by kernels, which assume no Gaussian: KID, CMMD, and energy distance for points."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.manifold import blocks, squared_distances
from diffusion_jax.evaluation.metrics.metric import (
  LOWER,
  POOLED,
  Compared,
  Metric,
  MetricValues,
  Value,
  matrix,
  pair,
)

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def kernel_distance(
  x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'm d'], *, subsets: int, subset_size: int,
  seed: int,
) -> tuple[float, float]:
  """KID: mean and standard deviation of the unbiased MMD^2 over random subsets.

  Binkowski et al. 2018: kernel (x.y/d + 1)^3; the paper uses 100 subsets of 1000. Each takes
  `subset_size` rows of x, then y, without replacement. Expectation 0 for equal distributions, so
  values below 0 occur.

  Subsets are torch-fidelity's with x as input 1 (its seed is 2020), and clean-fid's with x as its
  second features; sums are float64, theirs float32. UserError: different widths, subset_size
  outside 2 to n or m, or subsets below 1.
  """
  x, y = pair(x, y, None)
  if not 2 <= subset_size <= min(len(x), len(y)) or subsets < 1:
    raise UserError(
      f'The kernel distance cannot draw {subsets} subsets of {subset_size} from {len(x)} and '
      f'{len(y)} samples: choose a subset size from 2 to the smaller count.'
    )
  rng = np.random.RandomState(seed)
  values = [
    _unbiased_mmd2(
      x[rng.choice(len(x), subset_size, replace=False)],
      y[rng.choice(len(y), subset_size, replace=False)],
    )
    for _ in range(subsets)
  ]
  return float(np.mean(values)), float(np.std(values))


def _unbiased_mmd2(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'n d']) -> float:
  """Binkowski et al. 2018, eq. 4: pairs of a sample with itself are left out within x and y."""
  n, d = x.shape
  x, y = x.astype(np.float64), y.astype(np.float64)

  def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    k = a @ b.T / d + 1
    return k * k * k  # A power would take ten times as long.

  within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
  return float(within / (n * (n - 1)) - 2 * kernel(x, y).mean())


def cmmd(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'm d'], *, block: int = 4096) -> float:
  """1000 times the biased MMD^2 of CLIP embeddings, by a Gaussian kernel of sigma 10, >= 0.

  Jayasumana et al. 2024 and their code: embeddings are normalised and self-pairs count, so it falls
  like 1/n + 1/m. Published values use CLIP ViT-L/14 at 336 px. Within distance 2 the kernel k is
  nearly 1, so k - 1 is averaged in its place, which keeps the digits.
  """
  x, y = pair(x, y)
  unit = lambda v: v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30)
  x, y = unit(x), unit(y)
  # A constant that is taken off both changes no distance, only rounding.
  centre = y.mean(axis=0)
  x, y = (np.asarray(v - centre, np.float32) for v in (x, y))
  mean = functools.partial(_mean_kernel_less_one, block=block)
  return CMMD_SCALE * max(mean(x, x) + mean(y, y) - 2 * mean(x, y), 0.0)


def _mean_kernel_less_one(x: np.ndarray, y: np.ndarray, block: int) -> float:
  total = 0.0
  for rows, x_part in blocks(x, block):
    for columns, y_part in blocks(y, block):
      sums = _kernel_less_one(x_part, y_part, len(columns))
      total += np.asarray(sums, np.float64)[: len(rows)].sum()
  return total / (len(x) * len(y))


@jax.jit
def _kernel_less_one(
  x: Float[Array, 'n d'], y: Float[Array, 'm d'], columns: int
) -> Float[Array, 'n']:
  """Sums over the first `columns` rows of y, which are not padding."""
  kernel = jnp.expm1(squared_distances(x, y) * (-0.5 / CMMD_SIGMA**2))
  return jnp.where(jnp.arange(len(y)) < columns, kernel, 0).sum(axis=1)


def energy_distance(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'm d']) -> float:
  """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013, eq. 5), unbiased, so perhaps < 0."""
  from scipy.spatial.distance import cdist, pdist  # Takes long to import.

  x, y = matrix(x, 'x'), matrix(y, 'y')
  between = cdist(x, y).mean()
  within = sum(pdist(points).mean() for points in (x, y))
  return float(2 * between - within)


KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
_OF_REFERENCE = ('features', 'reference', 'reference_images')


def _kid(of: Compared, values: MetricValues, seed: int) -> None:
  size = min(KID_SUBSET_SIZE, len(of.samples), len(of.reference))
  value, std = kernel_distance(
    of.samples, of.reference, subsets=KID_SUBSETS, subset_size=size, seed=seed
  )
  values.add(f'kid{of.suffix}', value)
  values.add(f'kid{of.suffix}_std', std)


def _cmmd(of: Compared, values: MetricValues, seed: int) -> None:
  values.add('cmmd', cmmd(of.samples, of.reference))


KID = Metric('kid', _kid, POOLED, values=(
  Value('kid{suffix}', 'Kernel distance, {features} features', LOWER, _OF_REFERENCE, alone='KID'),
  Value('kid{suffix}_std', 'Kernel distance, {features} features, deviation over subsets', '',
        _OF_REFERENCE, alone='KID, deviation over subsets'),
))
CMMD = Metric('cmmd', _cmmd, ('embedding',), values=(
  Value('cmmd', 'CMMD', LOWER, _OF_REFERENCE, 'clip'),
))
