"""Statistics against numpy on all rows at once."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import Statistics


def _features(n=101, d=7, seed=0):
  # A mean far from zero is where raw second moments lose their digits.
  rng = np.random.default_rng(seed)
  return 1e4 + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def test_from_features_is_numpys_mean_and_unbiased_covariance():
  features = _features()
  statistics = Statistics.from_features(features)
  assert statistics.n == 101
  np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
  np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=1e-9)


def test_many_rows_are_taken_in_parts():
  features = _features(n=20_000, d=3).astype(np.float32)
  statistics = Statistics.from_features(features)
  assert statistics.n == 20_000
  np.testing.assert_allclose(statistics.covariance, np.cov(features.T.astype(float)), rtol=1e-9)


@pytest.mark.parametrize('cuts', [[1], [0, 3, 4, 99], [50], [100, 101]])
def test_merging_uneven_parts_equals_all_at_once(cuts):
  features = _features()
  merged = Statistics.empty(7)
  for part in np.split(features, cuts):
    merged = merged.merge(Statistics.from_features(part))
  whole = Statistics.from_features(features)
  assert merged.n == whole.n
  np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
  np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-8, atol=1e-6)


def test_merge_by_hand_in_both_orders():
  a = Statistics.from_features(np.array([[0.0]]))
  b = Statistics.from_features(np.array([[3.0], [6.0]]))
  for merged in (a.merge(b), b.merge(a)):
    assert (merged.n, merged.mean[0], merged.m2[0, 0]) == (3, 3.0, 18.0)


def test_empty_is_neutral_on_both_sides():
  whole, empty = Statistics.from_features(_features()), Statistics.empty(7)
  for merged in (whole.merge(empty), empty.merge(whole)):
    assert merged.n == 101
    np.testing.assert_array_equal(merged.mean, whole.mean)
    np.testing.assert_array_equal(merged.m2, whole.m2)
  assert empty.merge(empty).n == 0


def test_float16_features_are_summed_in_float64():
  features = np.full((5000, 1), 100.0, np.float16)
  assert Statistics.from_features(features).mean[0] == 100.0


def test_mistakes_are_refused():
  with pytest.raises(UserError, match='NaN'):
    Statistics.from_features(np.array([[1.0, np.nan]]))
  with pytest.raises(UserError, match=r'\[n d\]'):
    Statistics.from_features(np.zeros((2, 3, 4)))
  with pytest.raises(UserError, match='same feature extractor'):
    Statistics.empty(3).merge(Statistics.empty(4))
  with pytest.raises(UserError, match='at least 2'):
    _ = Statistics.from_features(np.zeros((1, 3))).covariance
