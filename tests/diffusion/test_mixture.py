"""Closed forms of Gaussian mixtures against integrals, gradients and hand-made numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.mixture import GaussianMixture
from tests.diffusion.exact_mixture import component

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.25, 0.5])
LINE = GaussianMixture(WEIGHTS, MEANS, VARIANCES)
PLANE = GaussianMixture(
  np.array([0.2, 0.5, 0.3]),
  np.array([[-1.0, 0.5], [2.0, 1.0], [0.0, -1.5]]),
  np.array([[0.2, 0.6], [0.5, 0.1], [0.3, 0.3]]),
)
PAIRS = [(1.0, 0.1), (0.8, 0.6), (0.3, 1.0), (0.0, 1.0)]
GRID = np.linspace(-12, 12, 24001)
STEP = GRID[1] - GRID[0]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def density(x):
  """By numpy alone."""
  each = np.exp(-((x[:, None] - MEANS) ** 2) / (2 * VARIANCES)) / np.sqrt(2 * np.pi * VARIANCES)
  return each @ WEIGHTS


def test_log_density_and_moments():
  np.testing.assert_allclose(jnp.exp(LINE.log_density(GRID)), density(GRID), atol=1e-14)
  mean = (GRID * density(GRID)).sum() * STEP
  np.testing.assert_allclose(LINE.mean(), mean, rtol=1e-12)
  variance = (GRID**2 * density(GRID)).sum() * STEP - mean**2
  np.testing.assert_allclose(LINE.variance(), variance, rtol=1e-12)


@pytest.mark.parametrize('alpha,sigma', PAIRS)
def test_diffusing_convolves_and_the_posterior_follows_bayes(alpha, sigma):
  x = np.array([-1.3, 0.2, 1.7])
  likelihood = np.exp(-((x[:, None] - alpha * GRID) ** 2) / (2 * sigma**2))
  joint = density(GRID) * likelihood / np.sqrt(2 * np.pi * sigma**2)
  total = joint.sum(axis=1) * STEP
  np.testing.assert_allclose(jnp.exp(LINE.diffused(alpha, sigma).log_density(x)), total, rtol=1e-9)
  mean = (joint * GRID).sum(axis=1) * STEP / total
  np.testing.assert_allclose(LINE.denoise(x, alpha, sigma), mean, rtol=1e-9)
  second = (joint * GRID**2).sum(axis=1) * STEP / total
  posterior = jax.vmap(GaussianMixture.variance)(LINE.posterior(x, alpha, sigma))
  np.testing.assert_allclose(posterior, second - mean**2, rtol=1e-8)


@pytest.mark.parametrize('alpha,sigma', PAIRS)
def test_the_score_is_the_gradient_and_gives_the_denoiser_by_tweedie(alpha, sigma):
  noised = PLANE.diffused(alpha, sigma)
  x = jax.random.normal(jax.random.key(0), (5, 2), jnp.float64)
  score = noised.score(x)
  gradient = jax.grad(lambda x: noised.log_density(x).sum())(x)
  np.testing.assert_allclose(score, gradient, rtol=1e-10, atol=1e-12)
  x0 = PLANE.denoise(x, alpha, sigma)
  np.testing.assert_allclose(alpha * x0, x + sigma**2 * score, rtol=1e-10, atol=1e-12)


def test_extremes():
  x = jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
  np.testing.assert_allclose(PLANE.denoise(x, 1.0, 0.0), x, rtol=1e-12)
  np.testing.assert_allclose(PLANE.denoise(x, 0.0, 1.0), jnp.stack([PLANE.mean()] * 4), rtol=1e-12)
  slope = jax.grad(lambda a: PLANE.denoise(x, a, 1.0).sum())(0.0)
  assert jnp.isfinite(slope) and slope != 0


def test_round_components_of_images_are_products_over_pixels():
  means = np.stack([np.full((2, 2, 1), m) for m in MEANS])
  images = GaussianMixture(WEIGHTS, means, VARIANCES)
  x = np.array([0.1, -0.4, 1.2, 2.0])
  pixels = np.exp(-((x[:, None] - MEANS) ** 2) / (2 * VARIANCES)) / np.sqrt(2 * np.pi * VARIANCES)
  found = images.log_density(x.reshape(1, 2, 2, 1))
  np.testing.assert_allclose(found, [np.log(WEIGHTS @ pixels.prod(axis=0))], rtol=1e-12)


def test_samples_have_the_moments_and_the_classes():
  draws = np.asarray(PLANE.sample(jax.random.key(1), 20000))
  np.testing.assert_allclose(draws.mean(axis=0), PLANE.mean(), atol=0.03)
  np.testing.assert_allclose(draws.var(axis=0), PLANE.variance(), rtol=0.03)
  shares = np.exp(np.asarray(PLANE.log_class_probabilities(draws)))
  np.testing.assert_allclose(shares.mean(axis=0), PLANE.weights, atol=0.015)


def test_the_dtype_is_that_of_x():
  x = jnp.ones((3, 2), jnp.float32)
  assert PLANE.denoise(x, 0.5, 0.5).dtype == jnp.float32
  assert PLANE.score(x).dtype == PLANE.log_density(x).dtype == jnp.float32


def test_a_component_alone_is_the_class_conditional_density():
  x = np.array([[0.3, 0.1], [2.0, -1.0]])
  joint = PLANE.component_log_densities(x)[:, 1]
  np.testing.assert_allclose(component(PLANE, 1).log_density(x), joint - np.log(0.5), rtol=1e-12)
