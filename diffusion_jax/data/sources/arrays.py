"""Sources in memory: columns, points in the plane, and random images that measure speed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import OF_FOLDERS, square_of, without_effect
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.registry import check
from diffusion_jax.sizes import nearest_to_square

SPLITS = {'train': (0, 32_768), 'test': (1, 2_048)}
"""Seed and number of points."""


class ArraySource:
  """Rows of columns by name, arrays [n, ...] or lists of n values, such as cached latents.

  unreadable: row -> why it is empty. UserError unless all columns have one length.
  """

  def __init__(
    self, columns: Mapping[str, np.ndarray | list], unreadable: Mapping[int, str] | None = None
  ):
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
      raise UserError(f'Columns must have one common length, got {lengths}: fix the longer ones.')
    self._columns, self._unreadable = dict(columns), dict(unreadable or {})
    self._length = next(iter(lengths.values()))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return row `index`. Unreadable where there is nothing in it."""
    index = range(self._length)[index]
    if index in self._unreadable:
      raise Unreadable(self._unreadable[index])
    return {name: column[index] for name, column in self._columns.items()}


def moons(rng: np.random.Generator, count: int) -> np.ndarray:
  """Return points of two half circles that reach into each other, with noise of deviation 0.07."""
  angle = np.pi * rng.random(count)
  upper = rng.random(count) < 0.5
  x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
  y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
  points = np.stack([x - 0.5, y - 0.25], axis=1)
  return 1.4 * (points + 0.07 * rng.standard_normal((count, 2)))


def rings(rng: np.random.Generator, count: int) -> np.ndarray:
  """Return points of circles of radii 0.7 and 1.7, with noise of deviation 0.07."""
  angle = 2 * np.pi * rng.random(count)
  radius = np.where(rng.random(count) < 0.5, 0.7, 1.7) + 0.07 * rng.standard_normal(count)
  return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def mixture(rng: np.random.Generator, count: int) -> np.ndarray:
  """Return points of eight Gaussians of deviation 0.12, on a circle of radius 1.4."""
  angle = np.pi / 4 * rng.integers(8, size=count)
  centres = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return centres + 0.12 * rng.standard_normal((count, 2))


POINT_SETS = {'moons': moons, 'rings': rings, 'mixture': mixture}


def points(config: DataConfig) -> tuple[ArraySource, ArraySource]:
  """Return (train, test) of the points that a `DataConfig` names."""
  without_effect(config, 'points', *OF_FOLDERS)
  train, test = (open_points(config.dataset, split, square_of(config)) for split in SPLITS)
  return train, test


def open_points(name: str, split: str, size: int) -> ArraySource:
  """Records of `size` fixed points, 'points' [size 2], float32, of about unit deviation.

  Many points a record, so that reading takes less time than training. UserError: an unknown name,
  or too many points.
  """
  check(POINT_SETS, name, 'the set of points')
  seed, count = SPLITS[split]
  if not 1 <= size <= count:
    raise UserError(f'data.size is {size}; give the points of a record, from 1 to {count}.')
  points = POINT_SETS[name](np.random.default_rng(seed), count // size * size)
  return ArraySource({'points': points.astype(np.float32).reshape(-1, size, 2)})


LABELS = 10
PICTURES = 8
"""So many different pictures: making one takes longer than reading it."""


class SyntheticImages(Sequence):
  """Records as of a folder of pictures: image uint8 [h w 3], two captions, label, sizes.

  shapes: (height, width) that the pictures have in turn; images have that nearest to a square.
  """

  def __init__(self, shapes: Sequence[tuple[int, int]], count: int):
    rng = np.random.default_rng(0)
    self._shapes, self._at = np.asarray(shapes, np.int32), nearest_to_square(tuple(shapes))
    edge = self._shapes.max(axis=0)
    self._images = rng.integers(0, 256, (PICTURES, *edge, 3), np.uint8)
    letters = rng.integers(ord('a'), ord('z') + 1, (count, 2, 4, 5))
    self._captions = [
      [' '.join(''.join(map(chr, word)) for word in caption) for caption in record]
      for record in letters
    ]

  def __len__(self) -> int:
    return len(self._captions)

  @property
  def labels(self) -> list[str]:
    """The label of every record."""
    return [f'class {index % LABELS}' for index in range(len(self))]

  def original_sizes(self) -> np.ndarray:
    """(height, width) of the pictures, int32 [n 2]."""
    return self._shapes[np.arange(len(self)) % len(self._shapes)]

  def at_sizes(self, shapes: np.ndarray) -> 'SyntheticImages':
    """A source whose record i is of shapes[i], (height, width), int32 [n 2]."""
    other = copy.copy(self)
    other._at = shapes
    return other

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    height, width = map(int, self._at if isinstance(self._at, tuple) else self._at[index])
    return {
      'image': self._images[index % PICTURES, :height, :width], 'captions': self._captions[index],
      'id': str(index), 'label': f'class {index % LABELS}',
      'sizes': np.asarray([height, width, 0, 0, height, width], np.float32),
    }
