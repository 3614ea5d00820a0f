"""Points in the plane whose distribution one can see: moons, rings and a mixture."""

from collections.abc import Callable

import numpy as np

from diffusion_jax.data.sources import ArraySource
from diffusion_jax.errors import UserError

SPLITS = {'train': (0, 32_768), 'test': (1, 2_048)}
"""Seed and number of points."""


def moons(rng: np.random.Generator, count: int) -> np.ndarray:
  """Two half circles that reach into each other, with noise of deviation 0.07."""
  angle = np.pi * rng.random(count)
  upper = rng.random(count) < 0.5
  x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
  y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
  points = np.stack([x - 0.5, y - 0.25], axis=1)
  return 1.4 * (points + 0.07 * rng.standard_normal((count, 2)))


def rings(rng: np.random.Generator, count: int) -> np.ndarray:
  """Two circles about the origin, of radii 0.7 and 1.7, with noise of deviation 0.07."""
  angle = 2 * np.pi * rng.random(count)
  radius = np.where(rng.random(count) < 0.5, 0.7, 1.7) + 0.07 * rng.standard_normal(count)
  return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def mixture(rng: np.random.Generator, count: int) -> np.ndarray:
  """Eight Gaussians of deviation 0.12, on a circle of radius 1.4."""
  angle = np.pi / 4 * rng.integers(8, size=count)
  centres = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return centres + 0.12 * rng.standard_normal((count, 2))


POINT_SETS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
  'moons': moons, 'rings': rings, 'mixture': mixture,
}


def open_points(name: str, split: str, size: int) -> ArraySource:
  """Records of `size` points, 'points' [size 2], float32, of about unit deviation.

  Always the same. Many points make one record, so that reading does not take longer than training.

  Raises:
    UserError: for a name that is not in the table, or more points than there are.
  """
  if name not in POINT_SETS:
    raise UserError(f'there are no points {name!r}; choose one of {", ".join(POINT_SETS)}.')
  seed, count = SPLITS[split]
  if not 1 <= size <= count:
    raise UserError(f'data.size is {size}; give the points of a record, from 1 to {count}.')
  points = POINT_SETS[name](np.random.default_rng(seed), count // size * size)
  return ArraySource({'points': points.astype(np.float32).reshape(-1, size, 2)})
