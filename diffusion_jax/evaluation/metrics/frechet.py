"""Fréchet distance of features: FID where they are Inception's pool3, sFID its spatial ones.

Host numpy in float64: the distance is a small difference of large traces.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import Interval, interval_of_groups, random_groups
from diffusion_jax.evaluation.metrics.metric import (
  LOWER,
  OF_SETS,
  POOLED,
  Compared,
  Metric,
  MetricValues,
  Value,
)
from diffusion_jax.evaluation.metrics.pairwise import matrix
from diffusion_jax.evaluation.statistics import Moments, Statistics, check_same_width


class FrechetReference:
  """Distances of many fits to one reference, whose matrix root is taken once."""

  def __init__(self, reference: Moments):
    """UserError for fewer than 2 samples."""
    self.reference = reference
    self._covariance = reference.covariance
    values, vectors = np.linalg.eigh(self._covariance)
    # Rounding makes zero eigenvalues slightly negative.
    self._half = vectors * np.sqrt(np.clip(values, 0, None))

  def distance(self, other: Moments) -> float:
    """As `frechet_distance` of the reference and `other`."""
    check_same_width(self.reference, other)
    covariance = other.covariance
    product = self._half.T @ covariance @ self._half
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    distance = np.sum((self.reference.mean - other.mean) ** 2)
    distance += np.trace(self._covariance) + np.trace(covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)


def frechet_distance(a: Moments, b: Moments) -> float:
  """Fréchet distance of two Gaussians, |m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), >= 0.

  Heusel et al. 2017, eq. 6. The trace of the root is the sum of the roots of the eigenvalues of
  H^T S_b H, with S_a = H H^T: symmetric, so that a rank-deficient covariance (n < d) neither fails
  nor turns complex.

  Raises:
    UserError: fewer than 2 samples on a side, or features of different widths.
  """
  check_same_width(a, b)
  return FrechetReference(a).distance(b)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
  """A Fréchet distance at an infinite number of samples, and what it was fitted to.

  Attributes:
    value: where the line meets 1/N = 0; may lie below 0 for a nearly perfect model.
    standard_error: of that, by least squares. The subsets share samples, so it says how well the
      line fits, not how far another set of samples would lie; for that see `bootstrap`.
    slope: of the distance against 1/N, at least 0 but for noise.
    sizes, distances: the points of the fit.
  """

  value: float
  standard_error: float
  slope: float
  sizes: tuple[int, ...]
  distances: tuple[float, ...]


def extrapolated_frechet_distance(
  samples: Float[np.ndarray, 'n d'], reference: Moments | FrechetReference, *, seed: int,
  points: int = 15, smallest: int | None = None,
) -> Extrapolation:
  """Fréchet distance without its bias in the number of samples: FID-infinity.

  Chong & Forsyth 2020, "Effectively unbiased FID and Inception Score and where to find them".

  The distance of N samples exceeds that of infinitely many by about c/N, with a c that depends on
  the model, so that models may be ranked falsely at one N. A line is fitted through the distances
  of random subsets against 1/N. The bias of the reference's own number stays.

  Args:
    points: subsets, of sizes evenly spaced from `smallest` to n; each is drawn anew, without
      replacement. The paper's 15.
    smallest: size of the smallest subset; by default the paper's 5000, or n / 4 where there are
      fewer than 20,000. Below about twice the width the bias is no longer c/N.

  Raises:
    UserError: fewer than 3 points, sizes that do not fit n, or as in `frechet_distance`.
  """
  samples = matrix(samples, 'features', None)
  n = len(samples)
  smallest = min(5000, n // 4) if smallest is None else smallest
  if points < 3 or not 2 <= smallest <= n - points:
    raise UserError(
      f'{points} subsets of {smallest} to {n} samples cannot be extrapolated from: choose at least '
      '3 subsets, the smallest of 2 samples or more and well below all.'
    )
  if not isinstance(reference, FrechetReference):
    reference = FrechetReference(reference)
  rng = np.random.default_rng(seed)
  sizes = np.linspace(smallest, n, points).astype(int)
  distances = np.array([
    reference.distance(Statistics.from_features(samples[rng.permutation(n)[:size]]))
    for size in sizes
  ])
  design = np.stack([np.ones(points), 1 / sizes], axis=1)
  inverse = np.linalg.inv(design.T @ design)
  value, slope = inverse @ design.T @ distances
  residual = distances - design @ (value, slope)
  error = np.sqrt(inverse[0, 0] * (residual @ residual) / (points - 2))
  return Extrapolation(
    float(value), float(error), float(slope), tuple(sizes.tolist()), tuple(distances.tolist())
  )


GROUPS, WIDE = 32, 512
"""Groups of samples whose halves give the interval of a Fréchet distance; of features wider than
WIDE fewer halves are tried, for each takes the eigenvalues of a matrix of that width."""
FEWEST_FOR_FID = 10_000
"""Below so many samples FID is mostly bias (Chong & Forsyth 2020, fig. 1)."""


def _frechet(of: Compared, values: MetricValues, seed: int) -> None:
  """fid, sfid, or fd_FAMILY, with its interval; rfid ... of reconstructions."""
  name = of.distance
  n, d = of.statistics.n, len(of.statistics.mean)
  reference = FrechetReference(of.moments)
  value = reference.distance(of.statistics)
  interval = None
  if values.with_intervals and of.samples is not None and n >= 4 * GROUPS:
    groups = random_groups(of.samples, GROUPS, seed=seed)
    interval = interval_of_groups(
      reference.distance, groups, resamples=50 if d <= WIDE else 8, seed=seed
    )._replace(estimate=value)
  values.add(name, value, interval)
  if n < FEWEST_FOR_FID:
    values.warnings.append(
      f'{name} of {n} samples is not comparable with figures of other numbers of samples: it falls '
      f'as they grow. Published ones are of 50,000; fd_infinity is without that bias.'
    )
  if n <= d:
    values.warnings.append(f'{name}: {n} samples do not span features of width {d}.')


def _frechet_infinity(of: Compared, values: MetricValues, seed: int) -> None:
  """The same at an infinite number of samples."""
  found = extrapolated_frechet_distance(of.samples, of.moments, seed=seed)
  name = f'{of.distance}_infinity'
  reach = 1.96 * found.standard_error
  values.add(name, found.value, Interval(
    found.value, found.value - reach, found.value + reach, found.standard_error, 0.95, 'fit'
  ))


FD = Metric(
  'fd', _frechet, (*POOLED, 'spatial'), ('moments',), of_moments=True, values=(
    Value('{distance}', 'Fréchet distance, {features} features', LOWER, OF_SETS, alone='FID'),
  ),
)
FD_INFINITY = Metric('fd_infinity', _frechet_infinity, POOLED, ('moments',), values=(
  Value(
    '{distance}_infinity', 'Fréchet distance, {features} features, for infinitely many', LOWER,
    ('features', 'reference'), alone='FID, for infinitely many',
  ),
))
