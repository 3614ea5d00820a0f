"""Energy distance: for points of few dimensions, where no feature extractor is needed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from diffusion_jax.evaluation.metrics.checks import matrix


def energy_distance(x: Float[np.ndarray, 'n d'], y: Float[np.ndarray, 'm d']) -> float:
  """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (Szekely & Rizzo 2013, eq. 5).

  0 only where both have the same distribution; estimates of 0 may be a little below it.
  """
  from scipy.spatial.distance import cdist, pdist  # Takes long to import.

  x, y = matrix(x, 'x'), matrix(y, 'y')
  between = cdist(x, y).mean()
  within = sum(pdist(points).mean() for points in (x, y))
  return float(2 * between - within)
