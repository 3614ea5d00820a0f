"""Precision, recall, density and coverage against their definitions on all pairs in float64.

Nearest training features against all cosines at once, and planted copies.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics import manifold
from diffusion_jax.evaluation.metrics.kernel import cmmd
from diffusion_jax.evaluation.metrics.manifold import (
  count_in_balls,
  density_coverage,
  nearest_neighbours,
  neighbour_radii,
  precision_recall,
)


def _definition(samples, reference, k, inside):
  """(precision, recall, density, coverage) with balls that hold what is `inside` their radius."""
  samples, reference = (v.astype(np.float64) for v in (samples, reference))
  radius = lambda v: np.sort(cdist(v, v), axis=1)[:, k]
  between = cdist(samples, reference)
  held = inside(between, radius(reference))
  recall = inside(between.T, radius(samples)).any(1).mean()
  return held.any(1).mean(), recall, held.sum(1).mean() / k, held.any(0).mean()


def _two_sets(n=150, m=170, d=32, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) * 0.9 + 0.1, rng.normal(size=(m, d))


@pytest.mark.parametrize('far', [0.0, 3e4])
@pytest.mark.parametrize('block', [4096, 64])
def test_all_four_are_their_definitions(block, far):
  samples, reference = (np.asarray(v + far, np.float32) for v in _two_sets())
  wanted = _definition(samples, reference, 4, np.less)
  found = precision_recall(samples, reference, k=4, closed=False, block=block)
  found += density_coverage(samples, reference, k=4, block=block)
  assert 0.2 < wanted[0] < 0.99 and 0.2 < wanted[1] < 0.99
  assert found == pytest.approx(wanted, rel=1e-12)
  closed = precision_recall(samples, reference, k=4, block=block)
  assert closed == pytest.approx(_definition(samples, reference, 4, np.less_equal)[:2], rel=1e-12)


def test_equal_sets_have_the_known_values_and_ties_are_exact():
  # Every k-th neighbour lies exactly on a ball's surface.
  x, _ = _two_sets()
  assert precision_recall(x, x, k=3) == (1.0, 1.0)
  assert precision_recall(x, x, k=3) == (1, 1)
  assert density_coverage(x, x, k=5) == (1.0, 1.0)
  radii = neighbour_radii(x, 5)
  for closed, inside in ((True, 6), (False, 5)):
    _, by_ball = count_in_balls(x, x, radii, closed=closed)
    np.testing.assert_array_equal(by_ball, inside)


def test_a_grid_is_all_ties():
  # In float32 after centring hardly a distance of this grid is exact.
  line = np.arange(40) / 10
  grid = np.round(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) * 10)
  radii = neighbour_radii(grid, 4)
  inner = ((grid > 0) & (grid < 39)).all(axis=1)
  np.testing.assert_array_equal(radii[inner], 1.0)
  for closed, count in ((True, 5), (False, 1)):
    _, by_ball = count_in_balls(grid, grid, radii, closed=closed, block=300)
    np.testing.assert_array_equal(by_ball[inner], count)


def test_disjoint_sets_overlap_nowhere():
  x, y = _two_sets()
  assert precision_recall(x + 100, y) == (0.0, 0.0)
  assert precision_recall(x + 100, y) == (0, 0)
  assert density_coverage(x + 100, y) == (0.0, 0.0)


def test_a_model_that_draws_one_mode_is_precise_and_has_no_recall():
  rng = np.random.default_rng(0)
  modes = np.eye(4)[rng.integers(0, 4, 400)] * 20
  reference = modes + rng.normal(size=(400, 4)) * 0.5
  samples = np.eye(4)[np.zeros(200, int)] * 20 + rng.normal(size=(200, 4)) * 0.3
  precision, recall = precision_recall(samples, reference)
  assert precision > 0.95
  assert recall < 0.3
  assert density_coverage(samples, reference).coverage < 0.3


@pytest.mark.parametrize('spread', [0.0, 1e-6, 1e-3])
def test_collapsed_samples_are_right_though_float32_cannot_tell_them_apart(spread):
  rng = np.random.default_rng(0)
  reference = rng.normal(size=(120, 16))
  # Far from the reference's centre and alike: the product loses all digits of their distances.
  samples = reference[0] + 30 + rng.normal(size=(130, 16)) * spread
  copies = np.concatenate([reference[:60], samples])
  for x in (samples, copies):
    found = *precision_recall(x, reference, k=3), *density_coverage(x, reference, k=3)
    wanted = _definition(x, reference, 3, np.less_equal)[:2]
    wanted += _definition(x, reference, 3, np.less)[2:]
    assert found == pytest.approx(wanted, rel=1e-12)
  exact = np.sort(cdist(samples, samples, 'sqeuclidean'), axis=1)[:, 3]
  np.testing.assert_allclose(neighbour_radii(samples, 3, block=50), exact, rtol=1e-9)


def test_what_the_device_leaves_open_is_little_and_decided_on_the_host(monkeypatch):
  x, y = (v.astype(np.float32) for v in _two_sets(600, 600, 64))
  pairs = []
  exact = manifold.exact_squared
  monkeypatch.setattr(manifold, 'exact_squared', lambda a, b: pairs.append(len(a)) or exact(a, b))
  radii = neighbour_radii(y, 3)
  assert sum(pairs) == 600 * (3 + 1 + 8)
  pairs.clear()
  count_in_balls(x, y, radii, closed=True)
  assert sum(pairs) < 600 * 600 / 500


def test_what_has_no_neighbours_is_refused():
  x, y = _two_sets(5, 9)
  for k in (0, 5):
    with pytest.raises(UserError, match='nearest neighbour'):
      precision_recall(x, y, k=k)
    with pytest.raises(UserError, match='nearest neighbour'):
      density_coverage(x, y, k=k)
  with pytest.raises(UserError, match='width 32 and 3'):
    precision_recall(x, y[:, :3])


def test_memory_does_not_grow_with_the_pairs():
  x, y = (v.astype(np.float32) for v in _two_sets(2000, 2000, 8))
  run = lambda n: (
    precision_recall(x[:n], y[:n], block=256), density_coverage(x[:n], y[:n], block=256),
    nearest_neighbours(x[:n], y[:n], block=256), cmmd(x[:n], y[:n], block=256),
  )
  run(300)  # Compiles.
  tracemalloc.start()
  run(2000)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # One byte for each pair would be 4 MB.
  assert peak < 2.5e6


@pytest.mark.parametrize('block', [4096, 37])
def test_neighbours_are_the_largest_cosines(block):
  rng = np.random.default_rng(0)
  samples, training = rng.normal(size=(90, 24)) * 5, rng.normal(size=(200, 24))
  cosines = samples @ training.T
  cosines /= np.linalg.norm(samples, axis=1)[:, None] * np.linalg.norm(training, axis=1)
  order = np.argsort(-cosines, axis=1)[:, :4]
  found = nearest_neighbours(samples, training, k=4, block=block)
  np.testing.assert_array_equal(found.indices, order)
  np.testing.assert_allclose(
    found.similarities, np.take_along_axis(cosines, order, axis=1), atol=1e-6
  )


def test_copies_are_found_whatever_their_length_and_in_a_memory_map(tmp_path):
  rng = np.random.default_rng(0)
  training = rng.normal(size=(130, 8)).astype(np.float32)
  np.save(tmp_path / 'training.npy', training)
  mapped = np.load(tmp_path / 'training.npy', mmap_mode='r')
  found = nearest_neighbours(training[[129, 3, 64]] * 3, mapped, block=64)
  np.testing.assert_array_equal(found.indices[:, 0], [129, 3, 64])
  np.testing.assert_allclose(found.similarities, 1, atol=1e-6)


def test_of_equal_ones_the_first_is_named_and_zero_is_like_nothing():
  training = np.tile(np.eye(2), (5, 1))
  found = nearest_neighbours(np.array([[0.0, 2.0], [0.0, 0.0]]), training, k=2, block=4)
  np.testing.assert_array_equal(found.indices[0], [1, 3])
  np.testing.assert_array_equal(found.similarities[1], 0)


@pytest.mark.parametrize('k', [0, 6])
def test_impossible_numbers_are_refused(k):
  with pytest.raises(UserError, match='choose k from 1 to 5'):
    nearest_neighbours(np.ones((2, 3)), np.ones((5, 3)), k=k)
