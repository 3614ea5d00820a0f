"""Two sets of features seen as Gaussians: their divergences, and their leading directions."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  LOWER,
  OF_SETS,
  POOLED,
  Compared,
  Metric,
  MetricValues,
  Value,
)
from diffusion_jax.evaluation.metrics.pairwise import pair
from diffusion_jax.evaluation.statistics import Moments, check_same_width


@dataclasses.dataclass(frozen=True)
class GaussianKL:
  """Divergences of two fitted Gaussians in nats, and what their covariances were shrunk by.

  Attributes:
    forward: KL(a || b): large where a is spread over directions that b leaves out.
    backward: KL(b || a).
    shrinkage_a, shrinkage_b: in [0, 1]; 0 is the covariance as it is, 1 a sphere.
  """

  forward: float
  backward: float
  shrinkage_a: float
  shrinkage_b: float


def gaussian_kl(a: Moments, b: Moments, *, shrinkage: float | None = None) -> GaussianKL:
  """KL divergences in both directions of the Gaussians fitted to two sets of features.

  KL(a || b) = (Tr(S_b^-1 S_a) + (m_b - m_a)^T S_b^-1 (m_b - m_a) - d + ln det S_b / det S_a) / 2.

  With n <= d samples a covariance S has no inverse. Then it is replaced by
  (1 - r) S + r Tr(S)/d I, with r by oracle approximating shrinkage (Chen et al. 2010, eq. 23);
  with n > d it is taken as it is. A pseudo-inverse is not used: it would leave out the directions
  in which the two differ most. Compare only figures of equal n and equal shrinkage.

  Args:
    shrinkage: r for both, in place of the rule.

  Raises:
    UserError: widths differ, fewer than 2 samples, shrinkage outside [0, 1], or a singular
      covariance whose number of samples is not known.
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
  """Both sets of features on the leading axes of the reference, for a plot.

  Attributes:
    axes: [d k], of length 1; the largest entry of each is positive, so that plots do not flip.
    reference, samples: [n k] and [m k], coordinates less the reference's mean.
    reference_share, samples_share: [k], share of each set's total variance along each axis.
  """

  axes: Float[np.ndarray, 'd k']
  reference: Float[np.ndarray, 'n k']
  samples: Float[np.ndarray, 'm k']
  reference_share: Float[np.ndarray, 'k']
  samples_share: Float[np.ndarray, 'k']


def principal_components(
  reference: Float[np.ndarray, 'n d'], samples: Float[np.ndarray, 'm d'], *, k: int = 2
) -> PrincipalComponents:
  """Projects both sets on the k directions in which the reference varies most.

  Raises:
    UserError: k outside 1 to d, or features that are empty, not finite or of different widths.
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
  share = lambda x, whole: x.var(axis=0) / max(whole.var(axis=0).sum(), 1e-300)
  return PrincipalComponents(
    axes, *on_axes, share(on_axes[0], reference), share(on_axes[1], samples)
  )


def _divergences(of: Compared, values: MetricValues, seed: int) -> None:
  """kl (samples from reference) and kl_reverse of the fitted Gaussians, in nats."""
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
