"""Gaussians fitted to features: Fréchet distance (FID, sFID), divergences, leading directions.

In float64 numpy on the host: the distance is a small difference of large traces.
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
  matrix,
  pair,
)
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
    check_same_width(self.reference, other)
    covariance = other.covariance
    product = self._half.T @ covariance @ self._half
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    distance = np.sum((self.reference.mean - other.mean) ** 2)
    distance += np.trace(self._covariance) + np.trace(covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)


def frechet_distance(a: Moments, b: Moments) -> float:
  """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) >= 0 (Heusel et al. 2017, eq. 6).

  The root's trace sums the roots of the eigenvalues of H^T S_b H, S_a = H H^T: symmetric, so a
  rank-deficient covariance (n < d) neither fails nor turns complex. UserError: fewer than 2 samples
  on a side, or different widths.
  """
  check_same_width(a, b)
  return FrechetReference(a).distance(b)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
  """A Fréchet distance at an infinite number of samples, with its fit.

  value: the line at 1/N = 0; may be below 0 for a nearly perfect model. standard_error: of the
  least squares; as subsets overlap, it measures the line's fit, not the spread over sets of
  samples. slope: against 1/N. sizes, distances: points of the fit.
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

  Chong & Forsyth 2020, "Effectively unbiased FID and Inception Score and where to find them". N
  samples exceed infinitely many by about c/N, with c depending on the model, so models may be
  ranked falsely at one N. A line is fitted to the distances of random subsets against 1/N. The
  reference's own bias stays.

  points: subsets (15 in the paper), of sizes evenly spaced from `smallest` to n, without
  replacement. smallest: 5000 as in the paper, or n / 4 below 20,000; below about twice the width
  the bias is no longer c/N. UserError for fewer than 3 points, or sizes that do not fit n.
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
      f'{name} of {n} samples is not comparable with values of other numbers of samples: it falls '
      f'as they grow. Published ones are of 50,000; fd_infinity is without that bias.'
    )
  if n <= d:
    values.warnings.append(f'{name}: {n} samples do not span features of width {d}.')


def _frechet_infinity(of: Compared, values: MetricValues, seed: int) -> None:
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


@dataclasses.dataclass(frozen=True)
class GaussianKL:
  """KL(a || b), large where a is spread over directions that b leaves out, and KL(b || a), in nats;
  shrinkage of the covariances in [0, 1]: 0 is the covariance as it is, 1 a sphere.
  """

  forward: float
  backward: float
  shrinkage_a: float
  shrinkage_b: float


def gaussian_kl(a: Moments, b: Moments, *, shrinkage: float | None = None) -> GaussianKL:
  """KL divergences, both directions, of the Gaussians fitted to two sets of features.

  KL(a || b) = (Tr(S_b^-1 S_a) + (m_b - m_a)^T S_b^-1 (m_b - m_a) - d + ln det S_b / det S_a) / 2.
  With n <= d samples S has no inverse and becomes (1 - r) S + r Tr(S)/d I, r by oracle
  approximating shrinkage (Chen et al. 2010, eq. 23). (A pseudo-inverse would leave out the
  directions that differ most.) Compare only values of equal n and shrinkage.

  shrinkage: r for both. UserError: different widths, fewer than 2 samples, or a singular covariance
  of unknown n.
  """
  check_same_width(a, b)
  if shrinkage is not None and not 0 <= shrinkage <= 1:
    raise UserError(f'A shrinkage of {shrinkage} is none: choose one from 0 to 1.')
  factors, used = [], []
  for moments in (a, b):
    covariance = moments.covariance
    r = _shrinkage(covariance, moments.n) if shrinkage is None else float(shrinkage)
    used.append(r)
    factors.append(_factor(covariance, r))
  delta = a.mean - b.mean
  return GaussianKL(_kl(*factors, delta), _kl(*reversed(factors), delta), *used)


def _shrinkage(covariance: np.ndarray, n: int | None) -> float:
  d = len(covariance)
  if n is None or n > d:
    return 0.0
  trace, squares = np.trace(covariance), np.sum(covariance * covariance)
  top = (1 - 2 / d) * squares + trace**2
  bottom = (n + 1 - 2 / d) * (squares - trace**2 / d)
  return float(min(top / bottom, 1.0)) if bottom > 0 else 1.0


def _factor(covariance: np.ndarray, shrinkage: float) -> Float[np.ndarray, 'd d']:
  """Lower L of the shrunk covariance L L^T."""
  d = len(covariance)
  shrunk = (1 - shrinkage) * covariance
  shrunk[np.diag_indices(d)] += shrinkage * np.trace(covariance) / d
  try:
    factor = np.linalg.cholesky(shrunk)
  except np.linalg.LinAlgError:
    factor = np.zeros((d, d))
  # Rounding may give a singular matrix a factor; what it divides by would be noise.
  smallest, largest = factor.diagonal().min(), factor.diagonal().max()
  if smallest <= largest * np.sqrt(d * np.finfo(np.float64).eps):
    raise UserError(
      'A covariance is singular, so the KL divergence is infinite: give more samples than '
      'features, or a shrinkage above 0.'
    )
  return factor


def _kl(of: np.ndarray, to: np.ndarray, delta: np.ndarray) -> float:
  """KL of two Gaussians with factors L and means that differ by `delta`."""
  from scipy.linalg import solve_triangular  # Takes long to import.

  ratio = solve_triangular(to, np.column_stack([of, delta]), lower=True)
  log_ratio = np.log(to.diagonal()).sum() - np.log(of.diagonal()).sum()
  return max(float(((ratio * ratio).sum() - len(delta)) / 2 + log_ratio), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class PrincipalComponents:
  """Both sets of features on the reference's leading axes, less its mean, for a plot.

  axes: of length 1; each one's largest entry is positive. fractions: of each set's total variance.
  """

  axes: Float[np.ndarray, 'd k']
  reference: Float[np.ndarray, 'n k']
  samples: Float[np.ndarray, 'm k']
  reference_fraction: Float[np.ndarray, 'k']
  samples_fraction: Float[np.ndarray, 'k']


def principal_components(
  reference: Float[np.ndarray, 'n d'], samples: Float[np.ndarray, 'm d'], *, k: int = 2
) -> PrincipalComponents:
  """Project both sets on the reference's k leading directions.

  UserError: k outside 1 to d; empty or non-finite features, or different widths.
  """
  from scipy.linalg import eigh  # Takes long to import.

  reference, samples = pair(reference, samples)
  d = reference.shape[1]
  if not 1 <= k <= d:
    raise UserError(f'Features of width {d} have no {k} components: choose k from 1 to {d}.')
  centre = reference.mean(axis=0)
  reference = reference - centre
  _, axes = eigh(reference.T @ reference, subset_by_index=[d - k, d - 1])
  axes = axes[:, ::-1]
  axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(k)])
  on_axes = reference @ axes, (samples - centre) @ axes
  fraction = lambda x, whole: x.var(axis=0) / max(whole.var(axis=0).sum(), 1e-300)
  return PrincipalComponents(
    axes, *on_axes, fraction(on_axes[0], reference), fraction(on_axes[1], samples)
  )


def _divergences(of: Compared, values: MetricValues, seed: int) -> None:
  found = gaussian_kl(of.statistics, of.moments)
  values.add(f'kl{of.suffix}', found.forward)
  values.add(f'kl_reverse{of.suffix}', found.backward)
  shrunk = max(found.shrinkage_a, found.shrinkage_b)
  if shrunk:
    values.warnings.append(
      f'kl{of.suffix}: covariances were shrunk by up to {shrunk:.3g}, for want of samples.'
    )


KL = Metric('kl', _divergences, POOLED, ('moments',), of_moments=True, values=(
  Value('kl{suffix}', 'KL divergence from the reference, {features} features', LOWER, OF_SETS,
        alone='KL divergence from the reference'),
  Value('kl_reverse{suffix}', 'KL divergence of the reference, {features} features', LOWER,
        OF_SETS, alone='KL divergence of the reference'),
))
