"""Fréchet distance against closed forms and the formula with a matrix root."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.frechet import (
  FrechetReference,
  extrapolated_frechet_distance,
  frechet_distance,
)
from diffusion_jax.evaluation.statistics import FittedGaussian, Statistics


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


def test_published_statistics_give_the_same_distance():
  a, b = _random(200, 12, 1), _random(300, 12, 2, 1.0)
  published = FittedGaussian(b.mean, b.covariance)
  wanted = frechet_distance(a, b)
  assert frechet_distance(a, published) == pytest.approx(wanted, rel=1e-12)
  assert FrechetReference(published).distance(a) == pytest.approx(wanted, rel=1e-8)


TRUE = 0.1**2 * 8 + 8 * 0.1**2
"""Distance of N(0.1, 0.9^2 I) from N(0, I) of width 8, in closed form."""


def _samples(n, seed):
  return 0.1 + 0.9 * np.random.default_rng(seed).normal(size=(n, 8))


def test_the_bias_falls_like_one_over_n_and_extrapolation_removes_it():
  reference = FrechetReference(FittedGaussian(np.zeros(8), np.eye(8)))
  bias = {
    n: np.mean([
      reference.distance(Statistics.from_features(_samples(n, seed))) for seed in range(300)
    ]) - TRUE
    for n in (50, 100, 200)
  }
  assert bias[50] > 0.1
  assert bias[50] / bias[100] == pytest.approx(2, rel=0.15)
  assert bias[100] / bias[200] == pytest.approx(2, rel=0.25)

  fits = [
    extrapolated_frechet_distance(_samples(400, seed), reference, seed=seed, smallest=60)
    for seed in range(40)
  ]
  plain = np.array([fit.distances[-1] for fit in fits]) - TRUE
  extrapolated = np.array([fit.value for fit in fits]) - TRUE
  error = extrapolated.std() / np.sqrt(len(fits))
  assert abs(extrapolated.mean()) < 4 * error
  assert plain.mean() > 4 * abs(extrapolated.mean()) and plain.mean() > 6 * error
  assert np.mean([fit.slope for fit in fits]) == pytest.approx(bias[100] * 100, rel=0.3)
  assert fits[0].sizes[0] == 60 and fits[0].sizes[-1] == 400 and len(fits[0].sizes) == 15


def test_the_line_and_its_error_are_those_of_least_squares():
  fit = extrapolated_frechet_distance(
    _samples(300, 0), Statistics.from_features(_samples(300, 1)), seed=3, points=9
  )
  x, y = 1 / np.array(fit.sizes), np.array(fit.distances)
  wanted = scipy.stats.linregress(x, y)
  assert fit.sizes[0] == 75 and len(x) == 9
  assert fit.value == pytest.approx(wanted.intercept, rel=1e-9)
  assert fit.slope == pytest.approx(wanted.slope, rel=1e-9)
  assert fit.standard_error == pytest.approx(wanted.intercept_stderr, rel=1e-6)


@pytest.mark.parametrize('points, smallest', [(2, 10), (5, 1), (5, 38)])
def test_extrapolation_refuses_sizes_that_do_not_fit(points, smallest):
  samples = _samples(40, 0)
  with pytest.raises(UserError, match='cannot be extrapolated'):
    extrapolated_frechet_distance(
      samples, Statistics.from_features(samples), seed=0, points=points, smallest=smallest
    )
