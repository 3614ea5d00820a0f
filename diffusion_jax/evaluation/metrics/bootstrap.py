"""Confidence intervals by resampling features: how far a value would move with other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import PART, Statistics, merge_all


class Interval(NamedTuple):
  """A value with its confidence interval.

  estimate: of all samples. low, high: bounds at `level`, the fraction of such intervals that hold
  the true value. method: 'bootstrap', 'half samples' or 'fit'.
  """

  estimate: float
  low: float
  high: float
  standard_error: float
  level: float
  method: str


def bootstrap_mean(
  values: Float[np.ndarray, 'n'], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
  """Interval of a mean over samples, such as CLIP score (Efron 1979, percentiles).

  Not for values of whole sets; see `half_sample_interval`. UserError: fewer than 2 values, one that
  is not finite, or a level outside 0 to 1.
  """
  values = np.asarray(values, np.float64)
  _check(values.size if values.ndim == 1 else 0, resamples, level)
  if not np.isfinite(values).all():
    raise UserError('A confidence interval needs finite values: check the values of all images.')
  n, rng = len(values), np.random.default_rng(seed)
  means = np.array([
    np.bincount(rng.integers(0, n, n), minlength=n) @ values / n for _ in range(resamples)
  ])
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Interval(
    float(values.mean()), float(low), float(high), float(means.std()), level, 'bootstrap'
  )


def half_sample_interval(
  value: Callable[[Int[np.ndarray, 'm']], float], n: int, *, resamples: int = 50,
  level: float = 0.95, seed: int = 0,
) -> Interval:
  """Interval of any value of a set, from random halves of it without replacement.

  The delete-d jackknife with d = n/2 (Shao & Wu 1989): halves differ among each other as fresh sets
  of n do, so their standard deviation is the standard error; the interval is normal. Resampling
  with replacement would repeat samples, with nearest neighbours at distance 0 (precision, recall,
  coverage) and more bias of FID; a half's bias cancels. value: of the samples with those indices;
  called with all n, then each half. UserError: n below 4, resamples below 2, or a level outside 0
  to 1.
  """
  _check(n, resamples, level, fewest=4)
  rng = np.random.default_rng(seed)
  estimate = float(value(np.arange(n)))
  half = n // 2
  values = np.array([
    value(np.sort(rng.permutation(n)[:half])) for _ in range(resamples)
  ], np.float64)
  error = float(values.std(ddof=1) * np.sqrt(half / (n - half)))
  reach = NormalDist().inv_cdf((1 + level) / 2) * error
  return Interval(estimate, estimate - reach, estimate + reach, error, level, 'half samples')


def interval_of_groups(
  value: Callable[[Statistics], float], groups: Sequence[Statistics], *, resamples: int = 50,
  level: float = 0.95, seed: int = 0,
) -> Interval:
  """`half_sample_interval` of a value of statistics, such as FID, from random groups.

  Halves merge the statistics of whole groups, so features are read once. Samples must be in groups
  at random, about equally many each; 16 groups or more. A group of width 2048 takes 34 MB.
  """
  pick = lambda chosen: value(merge_all(groups[i] for i in chosen))
  return half_sample_interval(pick, len(groups), resamples=resamples, level=level, seed=seed)


def random_groups(
  features: Float[np.ndarray, 'n d'], count: int, *, seed: int = 0
) -> list[Statistics]:
  """Return statistics of `count` random, nearly equal groups, for `interval_of_groups`."""
  features = np.asarray(features)
  if not 1 <= count <= len(features):
    raise UserError(f'{len(features)} samples cannot be put into {count} groups: choose fewer.')
  order = np.random.default_rng(seed).permutation(len(features))
  groups = np.array_split(order, count)
  # Sorted, for features may lie on a disk, and in parts, for they may be many.
  return [
    merge_all(Statistics.from_features(features[np.sort(rows[i : i + PART])])
              for i in range(0, len(rows), PART))
    for rows in groups
  ]


def _check(n: int, resamples: int, level: float, fewest: int = 2) -> None:
  if n < fewest or resamples < 2 or not 0 < level < 1:
    raise UserError(
      f'A confidence interval at level {level} from {resamples} resamples of {n} values cannot be '
      f'had: give {fewest} values or more, 2 resamples or more, and a level between 0 and 1.'
    )
