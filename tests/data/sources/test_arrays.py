"""Points in the plane: where they lie, and that they are the same every time."""

import numpy as np
import pytest

from diffusion_jax.data.sources.arrays import POINT_SETS, ArraySource, open_points
from diffusion_jax.errors import UserError


def _all(name, split='train'):
  source = open_points(name, split, 64)
  return np.concatenate([source[i]['points'] for i in range(len(source))])


@pytest.mark.parametrize('name', POINT_SETS)
def test_points_are_centred_of_about_unit_deviation_and_repeatable(name):
  points = _all(name)
  assert points.dtype == np.float32 and points.shape == (32_768, 2)
  np.testing.assert_allclose(points.mean(axis=0), 0, atol=0.03)
  assert 0.8 < points.std() < 1.1
  np.testing.assert_array_equal(points, _all(name))
  test = _all(name, 'test')
  assert test.shape == (2048, 2) and not (test[:, None] == points[None, :500]).all(-1).any()


def test_rings_and_mixture_lie_where_they_say():
  radius = np.linalg.norm(_all('rings'), axis=1)
  near = np.minimum(np.abs(radius - 0.7), np.abs(radius - 1.7))
  assert near.max() < 0.07 * 5.5
  assert np.sqrt((near**2).mean()) == pytest.approx(0.07, rel=0.02)
  points = _all('mixture')
  angle = np.pi / 4 * np.arange(8)
  centres = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  distance = np.linalg.norm(points[:, None] - centres, axis=2)
  np.testing.assert_allclose(np.bincount(distance.argmin(axis=1)) / len(points), 1 / 8, atol=0.01)
  assert np.sqrt((distance.min(axis=1) ** 2).mean() / 2) == pytest.approx(0.12, rel=0.02)


def test_moons_are_half_circles():
  points = _all('moons') / 1.4 + [0.5, 0.25]
  upper = np.abs(np.hypot(*points.T) - 1)
  lower = np.abs(np.hypot(points[:, 0] - 1, points[:, 1] - 0.5) - 1)
  near = np.minimum(upper, lower)
  assert 0.05 < np.sqrt((near**2).mean()) <= 0.071


@pytest.mark.parametrize(('name', 'size', 'words'), [
  ('moon', 64, 'moons, rings, mixture'), ('moons', 4000, 'from 1 to 2048'),
])
def test_what_there_is_not(name, size, words):
  with pytest.raises(UserError, match=words):
    open_points(name, 'test', size)


def test_columns():
  source = ArraySource({'latents': np.arange(12.0).reshape(3, 4), 'id': ['a', 'b', 'c']})
  assert len(source) == 3
  np.testing.assert_array_equal(source[1]['latents'], [4, 5, 6, 7])
  assert source[-1]['id'] == 'c'
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize('columns', [{}, {'a': [1, 2], 'b': [1]}])
def test_columns_of_different_lengths(columns):
  with pytest.raises(UserError, match='common length'):
    ArraySource(columns)
