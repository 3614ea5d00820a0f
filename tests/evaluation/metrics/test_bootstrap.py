"""Intervals hold the true value as often as they say, on distributions where it is known."""

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.bootstrap import (
  bootstrap_mean,
  half_sample_interval,
  interval_of_groups,
  random_groups,
)
from diffusion_jax.evaluation.metrics.gaussians import FrechetReference
from diffusion_jax.evaluation.statistics import FittedGaussian, Statistics, merge_all


def _hits(make, truth, runs):
  intervals = [make(seed) for seed in range(runs)]
  return np.mean([each.low <= truth <= each.high for each in intervals]), intervals


@pytest.mark.parametrize('level', [0.95, 0.8])
@pytest.mark.parametrize('method', ['bootstrap', 'half samples'])
def test_intervals_of_a_gaussian_mean_hold_it_as_often_as_they_say(method, level):
  def make(seed):
    values = np.random.default_rng(seed).normal(3, 2, size=80)
    if method == 'bootstrap':
      return bootstrap_mean(values, resamples=150, level=level, seed=seed)
    return half_sample_interval(
      lambda rows: values[rows].mean(), 80, resamples=60, level=level, seed=seed
    )

  share, intervals = _hits(make, 3.0, 250)
  assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 250) + 0.01
  errors = [each.standard_error for each in intervals]
  assert np.mean(errors) == pytest.approx(2 / np.sqrt(80), rel=0.05)
  assert all(each.method == method and each.level == level for each in intervals)


def test_the_estimate_is_that_of_all_samples_and_the_seed_counts():
  values = np.arange(10.0)
  first = bootstrap_mean(values, seed=1)
  assert first.estimate == 4.5 and first.low < 4.5 < first.high
  assert bootstrap_mean(values, seed=1) == first != bootstrap_mean(values, seed=2)
  half = half_sample_interval(lambda rows: values[rows].max(), 10)
  assert half.estimate == 9.0


def test_the_error_of_a_frechet_distance_is_what_fresh_samples_have():
  reference = FrechetReference(FittedGaussian(np.zeros(6), np.eye(6)))
  draw = lambda seed: np.random.default_rng(seed).normal(0.4, 1.2, size=(400, 6))
  fresh = [reference.distance(Statistics.from_features(draw(seed))) for seed in range(150)]

  def make(seed):
    groups = random_groups(draw(seed), 20, seed=seed)
    return interval_of_groups(reference.distance, groups, resamples=40, seed=seed)

  share, intervals = _hits(make, np.mean(fresh), 40)
  errors = np.mean([each.standard_error for each in intervals])
  assert errors == pytest.approx(np.std(fresh), rel=0.2)
  assert share > 0.8
  assert intervals[0].estimate == pytest.approx(fresh[0], rel=1e-9)


def test_groups_are_all_samples_once():
  features = np.random.default_rng(0).normal(size=(103, 4)) + np.arange(103)[:, None]
  groups = random_groups(features, 20)
  assert sorted({group.n for group in groups}) == [5, 6]
  whole = merge_all(groups)
  assert whole.n == 103
  np.testing.assert_allclose(whole.mean, features.mean(axis=0), rtol=1e-12)
  # At random, not in the order of the samples.
  assert np.std([group.mean[0] for group in groups]) < 20


@pytest.mark.parametrize('act', [
  lambda: bootstrap_mean(np.zeros(1)), lambda: bootstrap_mean(np.zeros((3, 3))),
  lambda: bootstrap_mean(np.zeros(5), level=1.0),
  lambda: half_sample_interval(np.sum, 3), lambda: half_sample_interval(np.sum, 9, resamples=1),
])
def test_impossible_intervals_are_refused(act):
  with pytest.raises(UserError, match='confidence interval'):
    act()


def test_values_that_are_not_finite_and_too_many_groups_are_refused():
  with pytest.raises(UserError, match='finite'):
    bootstrap_mean(np.array([1.0, np.inf]))
  with pytest.raises(UserError, match='fewer'):
    random_groups(np.zeros((3, 2)), 4)
