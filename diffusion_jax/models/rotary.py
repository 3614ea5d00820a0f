"""Rotary positions (Su et al. 2021, eq. 34) of tokens that lie in a plane."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

THETA = 10_000.0


class Rotation(NamedTuple):
  """Cosines and sines of the angles of each token, float32 [n d/2]; pair i is 2 i and 2 i + 1."""

  cos: jax.Array
  sin: jax.Array


def rotation(positions: np.ndarray, features: tuple[int, ...]) -> Rotation:
  """Angles of tokens at `positions` [n axes]; each axis turns so many, even, features.

  The pairs of an axis turn by position * THETA^(-2 i / features).
  """
  angles = []
  for place, width in zip(np.asarray(positions, np.float64).T, features, strict=True):
    frequencies = THETA ** -(np.arange(0, width, 2) / width)
    angles.append(place[:, None] * frequencies)
  angles = np.concatenate(angles, axis=-1)
  return Rotation(*(jnp.asarray(turn(angles), jnp.float32) for turn in (np.cos, np.sin)))


def grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Positions of the tokens of an image, row after row: [h] and [w] -> [h*w 2]."""
  return np.stack(np.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)


def in_plane(h: int, w: int, features: int) -> Rotation:
  """Return the rotation of h x w tokens: half of the features by the row, half by the column."""
  return rotation(grid(np.arange(h), np.arange(w)), (features // 2, features // 2))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
  """Turn queries or keys [b n heads d] in float32; same type."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  cos, sin = by.cos[:, None], by.sin[:, None]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)
