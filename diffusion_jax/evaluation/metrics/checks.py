"""What features must be before a score is made of them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import PART


def matrix(
  x: np.ndarray, name: str, dtype: type | None = np.float64
) -> Float[np.ndarray, 'n d']:
  """x as an array of that type or its own. UserError if it is no matrix, empty or not finite."""
  x = np.asarray(x, dtype)
  if x.ndim != 2 or x.size == 0:
    raise UserError(f'The {name} must be a non-empty [n d] array, not {list(x.shape)}: check them.')
  parts = (x[i : i + PART] for i in range(0, len(x), PART))
  if not all(np.isfinite(part).all() for part in parts):
    raise UserError(f'The {name} hold NaN or infinite values: check the images and the weights.')
  return x


def pair(
  x: np.ndarray, y: np.ndarray, dtype: type | None = np.float64
) -> tuple[Float[np.ndarray, 'n d'], Float[np.ndarray, 'm d']]:
  """Two sets of features. UserError as in `matrix`, or if their widths differ."""
  x, y = matrix(x, 'features', dtype), matrix(y, 'features', dtype)
  if x.shape[1] != y.shape[1]:
    raise UserError(
      f'Features of width {x.shape[1]} and {y.shape[1]} cannot be compared: compute both with '
      'the same feature extractor.'
    )
  return x, y
