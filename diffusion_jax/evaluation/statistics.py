"""Mean and covariance of features, as sums that can be merged over batches, hosts and restarts.

Everything is float64 on the host; `device_statistics` sums on devices. Raw second moments lose so
many digits that the covariance can get negative eigenvalues, so deviations from the running mean
are summed instead (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NoReturn

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError

PART = 4096
"""Rows of features in memory at a time, so that it does not grow with their number."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Count, mean and summed outer products of deviations of n feature vectors of width d.

  Attributes:
    n: number of feature vectors seen, 0 or more.
    mean: [d] float64, their mean; zeros when n is 0.
    m2: [d d] float64, sum over vectors of (x - mean)(x - mean)^T; zeros when n is below 2.
  """

  n: int
  mean: Float[np.ndarray, 'd']
  m2: Float[np.ndarray, 'd d']

  @classmethod
  def empty(cls, d: int) -> Statistics:
    """Statistics of no vectors of width d: the neutral element of `merge`."""
    return cls(0, np.zeros(d), np.zeros((d, d)))

  @classmethod
  def from_features(cls, features: Float[np.ndarray, 'n d']) -> Statistics:
    """Statistics of all rows of `features`, of any float type. UserError if one is not finite."""
    features = np.asarray(features)
    if features.ndim != 2:
      raise UserError(
        f'Features must have the shape [n d], not {list(features.shape)}: flatten or pool them.'
      )
    if len(features) == 0:
      return cls.empty(features.shape[1])
    parts = (features[i : i + PART] for i in range(0, len(features), PART))
    return merge_all(cls._at_once(part.astype(np.float64)) for part in parts)

  @classmethod
  def _at_once(cls, features: Float[np.ndarray, 'n d']) -> Statistics:
    if not np.isfinite(features).all():
      raise UserError(
        'The features hold NaN or infinite values: check the images and the extractor weights.'
      )
    mean = features.mean(0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  def merge(self, other: Moments) -> Statistics:
    """Statistics of both sets together (Chan et al. 1979, eq. 2.1).

    UserError if the widths differ, or `other` does not know its number of samples.
    """
    check_same_width(self, other)
    if other.n is None:
      other.merge(self)
    n = self.n + other.n
    if n == 0:
      return self
    delta = other.mean - self.mean
    mean = self.mean + delta * (other.n / n)
    between = np.outer(delta, delta) * (self.n * other.n / n)
    return Statistics(n, mean, self.m2 + other.m2 + between)

  @property
  def covariance(self) -> Float[np.ndarray, 'd d']:
    """Unbiased covariance [d d], m2 / (n - 1). UserError if n is below 2."""
    if self.n < 2:
      raise UserError(
        f'A covariance needs at least 2 samples and there are {self.n}: evaluate more images.'
      )
    return self.m2 / (self.n - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class FittedGaussian:
  """Mean and covariance alone, as other tools publish them.

  Their files do not say of how many samples, so nothing can be merged into these, and what depends
  on the number of samples cannot be computed.

  Attributes:
    mean: [d] float64.
    covariance: [d d] float64, unbiased by the convention of those tools (numpy's `cov`).
  """

  mean: Float[np.ndarray, 'd']
  covariance: Float[np.ndarray, 'd d']

  @property
  def n(self) -> None:
    """Not known."""
    return None

  def merge(self, other: Moments) -> NoReturn:
    """UserError always."""
    raise UserError(
      'Statistics whose file does not say the number of samples cannot be merged with others: '
      'compute them again from the images.'
    )


Moments = Statistics | FittedGaussian
"""What a Gaussian is fitted by: `mean`, `covariance`, and `n`, None where it is not known."""


def merge_all(parts: Iterable[Statistics]) -> Statistics:
  """Statistics of all parts together, one at least. UserError as in `merge`."""
  return functools.reduce(lambda a, b: a.merge(b), parts)


def check_same_width(a: Moments, b: Moments) -> None:
  """UserError if the two are of features of different widths."""
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f'Features of width {len(a.mean)} and {len(b.mean)} cannot be put together or compared: '
      'compute both statistics with the same feature extractor.'
    )
