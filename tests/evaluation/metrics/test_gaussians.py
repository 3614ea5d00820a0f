"""Fréchet distance against closed forms and the formula with a matrix root.

Divergences in closed form, shrinkage where samples are few, and known principal axes.
"""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.gaussians import (
  FrechetReference,
  extrapolated_frechet_distance,
  frechet_distance,
  gaussian_kl,
  principal_components,
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


def _normal(mean, covariance):
  return FittedGaussian(np.array(mean, float), np.array(covariance, float))


def test_kl_of_diagonal_gaussians_in_both_directions():
  a, b = _normal([0, 1], np.diag([1.0, 4.0])), _normal([1, 1], np.diag([4.0, 1.0]))
  # Per axis: (variance ratio + squared difference / variance - 1 - log ratio) / 2.
  log = np.log(4)
  forward = (0.25 + 1 / 4 - 1 + log) / 2 + (4 - 1 - log) / 2
  backward = (4 + 1 - 1 - log) / 2 + (0.25 - 1 + log) / 2
  found = gaussian_kl(a, b)
  assert (found.forward, found.backward) == pytest.approx((forward, backward), rel=1e-12)
  assert (found.shrinkage_a, found.shrinkage_b) == (0, 0)


def test_kl_is_the_formula_with_inverses_and_zero_for_equals():
  rng = np.random.default_rng(0)
  a, b = (
    Statistics.from_features(rng.normal(size=(200, 9)) @ rng.normal(size=(9, 9)) + shift)
    for shift in (0, 1)
  )
  inverse, delta = np.linalg.inv(b.covariance), b.mean - a.mean
  wanted = np.trace(inverse @ a.covariance) + delta @ inverse @ delta - 9
  wanted += np.linalg.slogdet(b.covariance)[1] - np.linalg.slogdet(a.covariance)[1]
  assert gaussian_kl(a, b).forward == pytest.approx(wanted / 2, rel=1e-9)
  assert gaussian_kl(b, a).backward == pytest.approx(wanted / 2, rel=1e-9)
  assert gaussian_kl(a, a).forward == pytest.approx(0, abs=1e-9)


def test_kl_is_the_mean_log_ratio_of_the_densities():
  from scipy.stats import multivariate_normal

  rng = np.random.default_rng(0)
  covariances = [np.cov(rng.normal(size=(3, 9))) for _ in range(2)]
  a, b = _normal([0, 0, 1], covariances[0]), _normal([0.5, 0, 1], covariances[1])
  p, q = (multivariate_normal(x.mean, x.covariance) for x in (a, b))
  x = p.rvs(40_000, random_state=1)
  ratio = p.logpdf(x) - q.logpdf(x)
  error = ratio.std() / np.sqrt(len(x))
  assert abs(gaussian_kl(a, b).forward - ratio.mean()) < 4 * error


def test_few_samples_are_shrunk_as_much_as_they_need():
  rng = np.random.default_rng(0)
  scales = np.linspace(1, 3, 30)
  draw = lambda n: Statistics.from_features(rng.normal(size=(n, 30)) * scales)
  few, enough = draw(20), draw(31)
  found = gaussian_kl(few, enough)
  s = few.covariance
  squares, trace = np.trace(s @ s), np.trace(s)
  wanted = ((1 - 2 / 30) * squares + trace**2) / ((21 - 2 / 30) * (squares - trace**2 / 30))
  assert found.shrinkage_a == pytest.approx(min(wanted, 1), rel=1e-9) and 0 < wanted < 1
  assert found.shrinkage_b == 0
  assert np.isfinite([found.forward, found.backward]).all() and found.forward > 0
  # What is stated is what was done.
  r = found.shrinkage_a
  shrunk = _normal(few.mean, (1 - r) * s + r * trace / 30 * np.eye(30))
  assert gaussian_kl(shrunk, enough).forward == pytest.approx(found.forward, rel=1e-9)
  # A divergence from the truth beside which that of hardly any shrinkage is absurd.
  truth = _normal(np.zeros(30), np.diag(scales**2))
  little = gaussian_kl(truth, few, shrinkage=1e-3).forward
  assert gaussian_kl(truth, _normal(shrunk.mean, shrunk.covariance)).forward < little / 20
  flat = Statistics.from_features(np.eye(30)[:2] * 0 + np.eye(30)[0])
  with pytest.raises(UserError, match='singular'):
    gaussian_kl(flat, enough)


def test_a_singular_covariance_of_unknown_n_is_refused_unless_it_is_shrunk():
  few = Statistics.from_features(np.random.default_rng(0).normal(size=(5, 8)))
  published = FittedGaussian(few.mean, few.covariance)
  round_ = _normal(np.zeros(8), np.eye(8))
  with pytest.raises(UserError, match='singular'):
    gaussian_kl(published, round_)
  assert np.isfinite(gaussian_kl(published, round_, shrinkage=0.1).backward)
  with pytest.raises(UserError, match='from 0 to 1'):
    gaussian_kl(round_, round_, shrinkage=1.5)
  with pytest.raises(UserError, match='width 8 and 2'):
    gaussian_kl(round_, _normal(np.zeros(2), np.eye(2)))


def test_principal_components_are_the_references_axes():
  rng = np.random.default_rng(0)
  rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  reference = rng.normal(size=(5000, 6)) * [5, 3, 1, 0.5, 0.2, 0.1] @ rotation + 7
  samples = rng.normal(size=(4000, 6)) * [1, 1, 4, 0.5, 0.2, 0.1] @ rotation + 7 + rotation[1] * 2
  found = principal_components(reference, samples, k=2)
  np.testing.assert_allclose(np.abs(np.sum(found.axes.T * rotation[:2], axis=1)), 1, atol=1e-2)
  assert (found.axes[np.abs(found.axes).argmax(axis=0), [0, 1]] > 0).all()
  np.testing.assert_allclose(found.reference.mean(axis=0), 0, atol=1e-9)
  np.testing.assert_allclose(found.reference.std(axis=0), [5, 3], rtol=0.05)
  sign = np.sign(found.axes[:, 1] @ rotation[1])
  np.testing.assert_allclose(found.samples.mean(axis=0), [0, 2 * sign], atol=0.15)
  np.testing.assert_allclose(found.samples.std(axis=0), [1, 1], rtol=0.1)
  variances = np.square([5, 3, 1, 0.5, 0.2, 0.1])
  np.testing.assert_allclose(found.reference_fraction, variances[:2] / variances.sum(), rtol=0.05)
  np.testing.assert_allclose(found.samples_fraction, 1 / 18.3, rtol=0.15)
  with pytest.raises(UserError, match='k from 1 to 6'):
    principal_components(reference, samples, k=7)
