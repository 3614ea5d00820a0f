"""Nearest training features against all cosines at once, and planted copies."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.manifold import nearest_neighbours


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
