"""Scores against closed forms, direct formulas and numbers worked out by hand."""

import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics import (
  clip_score,
  frechet_distance,
  kernel_distance,
  psnr,
  retrieval_recall,
)
from diffusion_jax.evaluation.statistics import Statistics


def _gaussian(mean, covariance, n=11):
  return Statistics(n, np.array(mean, float), np.array(covariance, float) * (n - 1))


def _random(n, d, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  return Statistics.from_features(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift)


def test_frechet_distance_of_diagonal_gaussians():
  a = _gaussian([0, 1, 2], np.diag([1.0, 4.0, 9.0]))
  b = _gaussian([3, 1, 0], np.diag([4.0, 16.0, 1.0]))
  # Per axis: squared difference of means + squared difference of standard deviations.
  assert frechet_distance(a, b) == pytest.approx(9 + 0 + 4 + 1 + 4 + 4, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
  # A = [[2,1],[1,2]], B = diag(1,4): AB has trace 10, determinant 12, so
  # Tr sqrt(AB) = sqrt(trace + 2 sqrt(determinant)).
  a, b = _gaussian([0, 0], [[2, 1], [1, 2]]), _gaussian([0, 0], np.diag([1.0, 4.0]))
  expected = 4 + 5 - 2 * np.sqrt(10 + 2 * np.sqrt(12))
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('shift', [0.0, 3.0])
def test_frechet_distance_is_the_formula_with_a_matrix_root(shift):
  a, b = _random(200, 24, 1), _random(300, 24, 2, shift)
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
  assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_features():
  a, b = _random(8, 64, 1), _random(12, 64, 2)
  distance = frechet_distance(a, b)
  assert np.isfinite(distance) and distance > 1
  assert distance == pytest.approx(frechet_distance(b, a), rel=1e-5)
  rank_one = _gaussian([0, 0], [[1, 0], [0, 0]]), _gaussian([0, 0], [[0, 0], [0, 1]])
  assert frechet_distance(*rank_one) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize('n', [8, 200])
def test_frechet_distance_of_equals_is_zero_and_never_below(n):
  a = _random(n, 32, 3)
  assert 0 <= frechet_distance(a, a) < 1e-5 * np.trace(a.covariance)


def test_frechet_distance_refuses_too_few_samples_and_other_widths():
  one = Statistics.from_features(np.zeros((1, 3)))
  with pytest.raises(UserError, match='at least 2 samples'):
    frechet_distance(_random(9, 3, 0), one)
  with pytest.raises(UserError, match='width 3 and 4'):
    frechet_distance(_random(9, 3, 0), _random(9, 4, 0))


def test_kernel_distance_is_the_double_loop():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1
  kernel = lambda a, b: (np.dot(a, b) / 3 + 1) ** 3
  within = sum(
    kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j
  )
  across = sum(kernel(a, b) for a in x for b in y)
  mean, std = kernel_distance(x, y, subsets=3, subset_size=5, seed=0)
  assert mean == pytest.approx(within / 20 - 2 * across / 25, rel=1e-12)
  assert std == pytest.approx(0, abs=1e-12)  # Every subset is the whole set.


def test_kernel_distance_is_unbiased():
  rng = np.random.default_rng(1)
  draw = lambda: rng.normal(size=(40, 8))
  values = [
    kernel_distance(draw(), draw(), subsets=1, subset_size=40, seed=i)[0] for i in range(300)
  ]
  error = np.std(values) / np.sqrt(len(values))
  # The biased estimate would add 2 E[k(x,x) - k(x,x')] / 40, hundreds of these errors.
  assert abs(np.mean(values)) < 4 * error
  assert min(values) < 0


def test_kernel_distance_subsets_are_seeded_and_grow_with_the_shift():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(200, 8)), rng.normal(size=(150, 8))
  run = lambda shift, seed: kernel_distance(x, y + shift, subsets=20, subset_size=50, seed=seed)
  assert run(1.0, 0) == run(1.0, 0)
  assert run(1.0, 0) != run(1.0, 1)
  assert run(1.0, 0)[1] > 0
  assert run(2.0, 0)[0] > run(1.0, 0)[0] > 0.5


@pytest.mark.parametrize('subsets, size', [(1, 1), (1, 6), (0, 5)])
def test_kernel_distance_refuses_impossible_subsets(subsets, size):
  with pytest.raises(UserError, match='subset size'):
    kernel_distance(np.zeros((5, 2)), np.zeros((9, 2)), subsets=subsets, subset_size=size, seed=0)


def test_clip_score_by_hand():
  images = np.array([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]])
  texts = np.array([[3.0, 3.0], [0.0, 0.1], [-1.0, 0.0]])
  # Cosines sqrt(1/2), 1 and -1; the last counts as 0.
  assert clip_score(images, texts) == pytest.approx(100 * (np.sqrt(0.5) + 1) / 3, rel=1e-12)


def test_embeddings_that_do_not_pair_or_are_not_finite_are_refused():
  for score in (clip_score, lambda x, y: retrieval_recall(x, y, k=1, seed=0)):
    with pytest.raises(UserError, match='pair'):
      score(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(UserError, match='NaN'):
      score(np.full((3, 2), np.nan), np.ones((3, 2)))
    with pytest.raises(UserError, match='non-empty'):
      score(np.ones((0, 2)), np.ones((0, 2)))


def test_retrieval_of_identical_embeddings_is_perfect_whatever_their_length():
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(150, 16))
  lengths = rng.uniform(0.1, 10, size=(150, 1))
  assert retrieval_recall(embeddings * lengths, embeddings, k=1, seed=0) == 1.0
  assert retrieval_recall(embeddings, embeddings * lengths, k=1, seed=0) == 1.0


@pytest.mark.parametrize('k, candidates', [(1, 10), (5, 20)])
def test_retrieval_of_unrelated_embeddings_is_chance(k, candidates):
  rng = np.random.default_rng(1)
  images, texts = rng.normal(size=(2, 2000, 16))
  recall = retrieval_recall(images, texts, k=k, candidates=candidates, seed=0)
  chance = k / candidates
  assert abs(recall - chance) < 5 * np.sqrt(chance * (1 - chance) / 2000)
  assert recall == retrieval_recall(images, texts, k=k, candidates=candidates, seed=0)
  assert recall != retrieval_recall(images, texts, k=k, candidates=candidates, seed=3)


def test_retrieval_ranks_by_hand_with_fewer_captions_than_candidates():
  texts = np.eye(3)
  # Own captions come first, second and third.
  images = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  recalls = [retrieval_recall(images, texts, k=k, seed=0) for k in (1, 2, 3)]
  assert recalls == pytest.approx([1 / 3, 2 / 3, 1])


def test_retrieval_counts_ties_against_the_model():
  same = np.ones((20, 4))
  assert retrieval_recall(same, same, k=1, candidates=10, seed=0) == 0.0
  assert retrieval_recall(same, same, k=9, candidates=10, seed=0) == 0.0
  assert retrieval_recall(same, same, k=10, candidates=10, seed=0) == 1.0
  # A caption that comes twice can never be told from its copy.
  embeddings = np.eye(4)[[0, 0, 1, 2]]
  assert retrieval_recall(embeddings, embeddings, k=1, seed=0) == 0.5


def test_retrieval_refuses_a_meaningless_k():
  for k in (0, 11):
    with pytest.raises(UserError, match='candidates'):
      retrieval_recall(np.eye(3), np.eye(3), k=k, candidates=10, seed=0)


def test_psnr_by_hand():
  x = np.zeros((2, 4, 4, 3))
  y = np.stack([np.full((4, 4, 3), 0.2), np.full((4, 4, 3), -0.02)])
  # Errors a tenth and a hundredth of the peak of 2: 20 and 40 dB, averaged per image.
  assert psnr(x, y) == pytest.approx(30.0, abs=1e-9)
  assert psnr(x - 1, x + 1) == pytest.approx(0.0, abs=1e-9)
  assert psnr(x, x) == np.inf


def test_psnr_refuses_other_shapes():
  with pytest.raises(UserError, match='pairs'):
    psnr(np.zeros((2, 4, 4, 3)), np.zeros((1, 4, 4, 3)))
