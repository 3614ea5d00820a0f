"""CLIP score and retrieval against numbers worked out by hand."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.text import clip_score, retrieval_recall


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
