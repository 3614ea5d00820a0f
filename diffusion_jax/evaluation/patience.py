"""The best of a run's evaluations, and how long no later one has been better."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Course(NamedTuple):
  """best: step of the best value. since: evaluations after it; last: step of the last of them."""

  best: int
  since: int
  last: int


def course(values: Mapping[int, float], highest: bool, margin: float = 0.0) -> Course | None:
  """The course of values by step; a better one is so by more than `margin`.

  Values that are not finite are never better. None before there is a finite one.
  """
  sign = 1 if highest else -1
  best, since = None, 0
  for step in sorted(values):
    value = values[step]
    better = math.isfinite(value) and (
      best is None or sign * (value - values[best]) > margin
    )
    best, since = (step, 0) if better else (best, since + 1)
  return None if best is None else Course(best, since, max(values))
