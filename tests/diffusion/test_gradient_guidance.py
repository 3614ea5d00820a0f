"""Guidance by the gradient of a score, where the guided distribution has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.denoiser import every_kth, gradient_guidance, within
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.samplers import sampler
from diffusion_jax.diffusion.samplers.grid import padded
from diffusion_jax.errors import UserError
from tests.diffusion.exact_mixture import component, geometric

MIXTURE = GaussianMixture(
  np.array([0.2, 0.5, 0.3]), np.array([[-1.0, 0.5], [2.0, 1.0], [0.0, -1.5]]),
  np.array([0.3, 0.1, 0.2]),
)
CLASSES = np.array([0, 2, 1, 1])
TILT = np.array([0.7, -0.4])
SPREAD, MEAN = 0.25, np.array([0.3, -0.2])
gaussian = GaussianMixture(np.ones(1), MEAN[None], np.array([SPREAD]))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)


def log_probability(x, alpha, sigma):
  """log p(class | x_t = x), of each row's class."""
  noised = MIXTURE.diffused(alpha, sigma)
  return noised.log_class_probabilities(x)[jnp.arange(len(x)), CLASSES]


def linear(x0, alpha, sigma):
  return x0 @ TILT


@pytest.mark.parametrize('alpha,sigma', [(0.8, 0.6), (0.1, 0.99), (1.0, 0.05)])
def test_a_classifier_of_noised_data_makes_the_model_conditional(x, alpha, sigma):
  """By Bayes' rule: the exact classifier of a mixture leads to the exact denoiser of a class."""
  x = alpha * MIXTURE.means[CLASSES] + sigma * x
  guided = gradient_guidance(MIXTURE.denoise, log_probability, 1.0)(x, alpha, sigma)
  own = [component(MIXTURE, k).denoise(x[i, None], alpha, sigma)[0] for i, k in enumerate(CLASSES)]
  np.testing.assert_allclose(guided, np.stack(own), rtol=1e-8, atol=1e-9)
  twice = gradient_guidance(MIXTURE.denoise, log_probability, 2.0)(x, alpha, sigma)
  plain = MIXTURE.denoise(x, alpha, sigma)
  np.testing.assert_allclose(twice - plain, 2 * (guided - plain), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('scale', [0.0, 1.0, 3.0])
def test_a_score_of_the_estimate_tilts_a_gaussian(x, scale):
  """N(m, s^2) exp(S w x) is N(m + S s^2 w, s^2): the guided denoiser is that one's, and samples
  have its mean and its variance."""
  guided = gradient_guidance(gaussian.denoise, linear, scale, of='estimate')
  tilted = gaussian._replace(means=gaussian.means + scale * SPREAD * TILT)
  for alpha, sigma in ((0.8, 0.6), (0.05, 1.0), (1.0, 0.02)):
    found = guided(x, alpha, sigma)
    np.testing.assert_allclose(found, tilted.denoise(x, alpha, sigma), rtol=1e-10, atol=1e-12)
  start = jax.random.normal(jax.random.key(1), (2000, 2), jnp.float64)
  grid = geometric(50.0, 1e-3, 60)
  run = jax.jit(lambda start: sampler('heun')(guided, start, grid, None))
  samples = run(start)
  error = 4 * np.sqrt(SPREAD / len(samples)) + 0.005
  np.testing.assert_allclose(samples.mean(axis=0), tilted.means[0], atol=error)
  np.testing.assert_allclose(samples.var(axis=0), SPREAD, rtol=0.1)


def test_a_learned_variance_stays_and_pure_noise_is_not_guided(x):
  both = lambda x, alpha, sigma: (gaussian.denoise(x, alpha, sigma), 3 * x)
  for of in ('noised', 'estimate'):
    guided = gradient_guidance(both, linear, 2.0, of=of)
    np.testing.assert_array_equal(guided(x, 0.8, 0.6)[1], 3 * x)
    pure = guided(x, 0.0, 1.0)[0]
    np.testing.assert_allclose(pure, gaussian.denoise(x, 0.0, 1.0), rtol=1e-12)
  with pytest.raises(UserError, match='estimate'):
    gradient_guidance(both, linear, 2.0, of='x0')


@pytest.mark.parametrize(('k', 'wanted'), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_kth_step_is_guided(x, k, wanted):
  grid = tuple(np.asarray(part, np.float32) for part in geometric(20.0, 0.1, 5))
  alphas, sigmas = grid
  chosen = every_kth(padded(grid, 8), jnp.int32(k))
  steps = [i for i in range(5) if chosen(alphas[i], sigmas[i])]
  assert steps == wanted
  halfway = [i for i in range(5) if chosen(*((part[i] + part[i + 1]) / 2 for part in grid))]
  assert halfway == wanted
  guided = gradient_guidance(gaussian.denoise, linear, 1.0, of='estimate', when=chosen)
  for i in range(5):
    at = alphas[i], sigmas[i]
    moved = np.abs(guided(x, *at) - gaussian.denoise(x, *at)).max() > 1e-6
    assert moved == (i in wanted)


def test_levels_within_an_interval_are_guided(x):
  guided = gradient_guidance(gaussian.denoise, linear, 1.0, when=within((0.3, 2.0)))
  for alpha, sigma, inside in ((0.5, 1.0, True), (1.0, 0.3, False), (0.1, 1.0, False)):
    moved = np.abs(guided(x, alpha, sigma) - gaussian.denoise(x, alpha, sigma)).max() > 0
    assert moved == inside
