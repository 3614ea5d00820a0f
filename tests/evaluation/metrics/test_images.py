"""PSNR by hand; SSIM against its formula, window by window.

CLIP score and retrieval against numbers worked out by hand.

Inception score and class accuracy against values known by hand.
"""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.images import (
  class_hits,
  clip_score,
  inception_score,
  psnr_of_each,
  retrieval_recall,
  ssim_of_each,
)


def test_psnr_by_hand():
  x = np.zeros((2, 4, 4, 3))
  y = np.stack([np.full((4, 4, 3), 0.2), np.full((4, 4, 3), -0.02)])
  # Errors a tenth and a hundredth of the peak of 2: 20 and 40 dB, averaged per image.
  assert psnr_of_each(x, y).mean() == pytest.approx(30.0, abs=1e-9)
  assert psnr_of_each(x, y) == pytest.approx([20, 40])
  assert psnr_of_each(x - 1, x + 1).mean() == pytest.approx(0.0, abs=1e-9)
  assert psnr_of_each(x, x).mean() == np.inf


def test_psnr_refuses_other_shapes():
  with pytest.raises(UserError, match='pairs'):
    psnr_of_each(np.zeros((2, 4, 4, 3)), np.zeros((1, 4, 4, 3)))


def _windows(x, y):
  """SSIM of two images [h w] by its definition: each window written out, in float64."""
  offsets = np.arange(-5, 6)
  weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
  weights /= weights.sum()
  c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
  values = []
  for i in range(5, x.shape[0] - 5):
    for j in range(5, x.shape[1] - 5):
      a, b = (v[i - 5 : i + 6, j - 5 : j + 6] for v in (x, y))
      mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
      var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
      covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
      values.append(
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
      )
  return np.mean(values)


def test_ssim_is_its_definition_window_by_window():
  rng = np.random.default_rng(0)
  x = np.clip(np.cumsum(rng.normal(size=(3, 17, 14, 2)) * 0.3, axis=1), -1, 1)
  y = np.clip(x + rng.normal(size=x.shape) * [[[[0.02]]], [[[0.2]]], [[[1.0]]]], -1, 1)
  wanted = [np.mean([_windows(x[i, ..., c], y[i, ..., c]) for c in range(2)]) for i in range(3)]
  assert wanted[0] > 0.95 > 0.5 > wanted[2]
  np.testing.assert_allclose(ssim_of_each(x, y), wanted, atol=2e-6)
  assert ssim_of_each(x, y).mean() == pytest.approx(np.mean(wanted), abs=2e-6)


def test_ssim_of_equal_opposite_and_flat_images():
  x = np.random.default_rng(0).uniform(-1, 1, size=(1, 16, 16, 3))
  assert ssim_of_each(x, x).mean() == pytest.approx(1, abs=1e-6)
  # Windows of mean 0, so that only the structure counts.
  board = np.indices((16, 16)).sum(axis=0)[None, ..., None] % 2 * 2.0 - 1
  assert ssim_of_each(board, -board).mean() == pytest.approx(-1, abs=0.01)
  # Flat images have no structure: (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.02^2.
  flat = lambda value: np.full((1, 12, 12, 1), value)
  assert ssim_of_each(flat(0.5), flat(0.1)).mean() == pytest.approx(0.1004 / 0.2604, rel=1e-5)


@pytest.mark.parametrize('x, y, message', [
  (np.zeros((2, 16, 16, 3)), np.zeros((1, 16, 16, 3)), 'pairs'),
  (np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)), '11 pixels'),
  (np.zeros((0, 16, 16, 3)), np.zeros((0, 16, 16, 3)), 'pairs'),
])
def test_ssim_refuses_what_has_no_windows(x, y, message):
  with pytest.raises(UserError, match=message):
    ssim_of_each(x, y)


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


def test_inception_score_of_certain_and_of_unsure_classifiers():
  certain = np.eye(5)[np.arange(50) % 5] * 1000
  # All classes alike often, each image of one: the number of classes.
  assert inception_score(certain, splits=1) == (pytest.approx(5, rel=1e-9), 0)
  assert inception_score(np.zeros((50, 5))) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
  mean, std = inception_score(certain, splits=10, seed=None)
  assert mean == pytest.approx(5, rel=1e-9) and std == pytest.approx(0, abs=1e-9)


def test_inception_score_is_its_definition_on_unequal_splits():
  logits = np.random.default_rng(0).normal(size=(23, 4)) * 2
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  parts = [p[:7], p[7:15], p[15:]]  # 23 cut in three by whole division.
  scores = [np.exp(np.mean((q * np.log(q / q.mean(0))).sum(1))) for q in parts]
  found = inception_score(logits, splits=3, seed=None)
  assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
  assert inception_score(logits + 500, splits=3, seed=None) == pytest.approx(found, rel=1e-9)
  assert inception_score(logits, splits=3) != found


def test_class_accuracy_by_hand():
  logits = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 1]])
  labels = np.array([0, 1, 2, 0])
  np.testing.assert_array_equal(class_hits(logits, labels), [1, 0, 0, 0])
  assert class_hits(logits, labels).mean() == 0.25
  assert class_hits(logits, labels, top=2).mean() == 0.5
  assert class_hits(logits, labels, top=3).mean() == 1.0


@pytest.mark.parametrize('labels, top, message', [
  ([0, 1], 1, '3 whole labels'), ([0, 1, 4], 1, '4 classes'), ([0, -1, 1], 1, '4 classes'),
  ([0, 1, 2], 5, '4 classes'), ([0.0, 1.0, 2.0], 1, 'whole labels'),
])
def test_labels_that_do_not_fit_are_refused(labels, top, message):
  with pytest.raises(UserError, match=message):
    class_hits(np.zeros((3, 4)), np.array(labels), top=top)


def test_splits_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='splits'):
    inception_score(np.zeros((3, 4)), splits=4)
