"""Inception score and class accuracy against values known by hand."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.logits import class_hits, inception_score


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
