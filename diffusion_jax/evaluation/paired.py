"""Confidence intervals of paired differences: over seeds, and over the steps of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from diffusion_jax.evaluation.metrics.bootstrap import Interval

SEEDS, STEPS, SINGLE = 'paired t over seeds', 't of batch means over steps', 'one pair, no interval'
"""Methods of intervals."""
BATCHES = 10


def over_seeds(differences: Sequence[float], level: float = 0.95) -> Interval:
  """The interval of a mean difference from pairs that differ in their seed alone.

  Student's paired t with n - 1 degrees of freedom. Of one pair the bounds are NaN.
  """
  return _student(np.asarray(differences, np.float64), level, SEEDS)


def over_steps(differences: Sequence[float], level: float = 0.95) -> Interval:
  """The interval of the mean of a series of differences, neighbours of which are correlated.

  Student's t of the means of `BATCHES` stretches (Law & Kelton, Simulation Modeling and Analysis,
  batch means): a stretch must be longer than the correlation. It is of these two runs alone and
  says nothing of other seeds. Of fewer than two values a stretch the bounds are NaN.
  """
  values = np.asarray(differences, np.float64)
  length = len(values) // BATCHES
  if length < 2:
    return Interval(float(values.mean()), math.nan, math.nan, math.nan, level, SINGLE)
  # The first values are left out where the stretches do not come out even.
  means = values[len(values) - BATCHES * length :].reshape(BATCHES, length).mean(axis=1)
  return _student(means, level, STEPS)


def _student(values: np.ndarray, level: float, method: str) -> Interval:
  mean, n = float(values.mean()), len(values)
  if n < 2:
    return Interval(mean, math.nan, math.nan, math.nan, level, SINGLE)
  error = float(values.std(ddof=1)) / math.sqrt(n)
  reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
  return Interval(mean, mean - reach, mean + reach, error, level, method)
