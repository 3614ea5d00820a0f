"""Mean and covariance of features, as sums that can be merged over batches, hosts and restarts.

Everything is float64 on the host. Raw second moments lose so many digits that the covariance can
get negative eigenvalues, so deviations from the running mean are summed instead (Chan, Golub and
LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances").
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError


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
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
      raise UserError(
        f'Features must have the shape [n d], not {list(features.shape)}: flatten or pool them.'
      )
    if not np.isfinite(features).all():
      raise UserError(
        'The features hold NaN or infinite values: check the images and the extractor weights.'
      )
    if len(features) == 0:
      return cls.empty(features.shape[1])
    mean = features.mean(0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  def merge(self, other: Statistics) -> Statistics:
    """Statistics of both sets together (Chan et al. 1979, eq. 2.1). UserError if widths differ."""
    _check_same_width(self, other)
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

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz with the keys n, mean and m2; the file is either whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
      with open(temporary, 'wb') as file:
        np.savez(file, n=np.int64(self.n), mean=self.mean, m2=self.m2)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: str | os.PathLike) -> Statistics:
    """Reads what `save` wrote. UserError if the file is missing, damaged or something else."""
    if not Path(path).is_file():
      raise UserError(f'There are no statistics at {path}: compute them first or correct the path.')
    try:
      with np.load(path, allow_pickle=False) as file:
        n, mean, m2 = int(file['n']), file['mean'], file['m2']
    except (KeyError, IndexError, TypeError, ValueError, EOFError, OSError,
            zipfile.BadZipFile) as error:
      raise UserError(
        f'{path} is not a whole statistics file (npz with n, mean and m2): compute it again.'
      ) from error
    if n < 0 or mean.ndim != 1 or m2.shape != mean.shape * 2:
      raise UserError(f'The arrays in {path} do not fit each other: compute the file again.')
    return cls(n, mean.astype(np.float64), m2.astype(np.float64))


def _check_same_width(a: Statistics, b: Statistics) -> None:
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f'Statistics of {len(a.mean)} and of {len(b.mean)} features cannot be put together: '
      'compute both with the same feature extractor.'
    )
