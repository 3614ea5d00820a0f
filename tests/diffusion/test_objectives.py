"""Losses and noise, by hand and against exact minimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import losses
from diffusion_jax.diffusion.losses import (
  WEIGHTINGS,
  add_noise,
  huber_delta,
  min_snr,
  offset_noise,
  perturb_input,
  pseudo_huber,
  squared_error,
  weight,
  weighted_loss,
  weighting,
)
from diffusion_jax.diffusion.parameterization import (
  BLIND_AT_ZERO_SNR,
  PREDICTIONS,
  Parameterization,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def test_the_forward_process_has_its_mean_and_variance():
  x0 = jnp.full((1, 40000), 1.5)
  alpha, sigma = jnp.array([0.8]), jnp.array([0.6])
  x = add_noise(x0, jax.random.normal(jax.random.key(0), x0.shape), alpha, sigma)
  np.testing.assert_allclose(x.mean(), 0.8 * 1.5, atol=4 * 0.6 / 200)
  np.testing.assert_allclose(x.std(), 0.6, rtol=4 / np.sqrt(80000))


def test_offset_noise_shares_one_offset_per_image_and_channel():
  noise = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.5)
  np.testing.assert_allclose(noise.var(), 1.25, rtol=0.02)
  # The mean over 64 pixels keeps the offset (0.25) and 1/64 of the pixel noise.
  np.testing.assert_allclose(noise.mean(axis=(1, 2)).var(), 0.25 + 1 / 64, rtol=0.08)
  plain = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.0)
  np.testing.assert_allclose(plain.mean(axis=(1, 2)).var(), 1 / 64, rtol=0.08)


def test_perturbed_inputs_have_more_noise_around_the_same_target():
  eps = jax.random.normal(jax.random.key(0), (1, 40000))
  seen = perturb_input(jax.random.key(1), eps, 0.5)
  np.testing.assert_allclose(seen.var(), 1.25, rtol=0.03)
  np.testing.assert_allclose((seen - eps).std(), 0.5, rtol=0.02)
  assert perturb_input(jax.random.key(1), eps, 0.0) is eps


def test_squared_error_is_per_example_and_at_least_float32():
  x = jnp.stack([jnp.zeros((2, 2, 1)), jnp.full((2, 2, 1), 3.0)])
  np.testing.assert_allclose(squared_error(x, jnp.ones_like(x)), [1.0, 4.0])
  assert squared_error(x, x).dtype == jnp.float64
  assert squared_error(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_pseudo_huber_is_the_square_of_small_and_the_size_of_large_errors():
  error = jnp.array([[1e-3], [3.0], [1e4]])
  zero = jnp.zeros_like(error)
  found = pseudo_huber(error, zero, 0.5)
  np.testing.assert_allclose(found[1], 2 * 0.5 * (np.sqrt(9.25) - 0.5), rtol=1e-12)
  np.testing.assert_allclose(found[0], 1e-6, rtol=1e-5)
  np.testing.assert_allclose(found[2], 1e4 - 0.5, rtol=1e-6)
  np.testing.assert_allclose(pseudo_huber(error, zero, 1e8), squared_error(error, zero), rtol=1e-6)
  per_example = pseudo_huber(jnp.full((2, 1), 3.0), jnp.zeros((2, 1)), jnp.array([0.5, 2.0]))
  np.testing.assert_allclose(per_example, [found[1], 4 * (np.sqrt(13) - 2)], rtol=1e-12)
  assert jax.grad(lambda e: pseudo_huber(e, zero, 0.5).sum())(zero)[0] == 0


def test_the_huber_schedule_falls_exponentially():
  np.testing.assert_allclose(huber_delta(jnp.array([0.0, 0.5, 1.0]), 0.01), [1, 0.1, 0.01])


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_the_weighted_loss_is_weight_times_error(prediction):
  rng = np.random.default_rng(0)
  x0, eps, output = map(jnp.asarray, rng.normal(size=(3, 2, 5)))
  alpha, sigma = jnp.array([0.9, 0.3]), jnp.array([0.4, 0.8])
  parameterization = Parameterization(prediction, 0.5)
  wanted = parameterization.target(x0, eps, alpha, sigma)
  simple = weighted_loss(parameterization, output, x0, eps, alpha, sigma)
  np.testing.assert_allclose(simple, ((output - wanted) ** 2).mean(1), rtol=1e-12)
  # Perfect but for one error in x_0 of 0.1: uniform weighting on x_0 sees just that.
  moved = parameterization.target(x0 + 0.1, eps - 0.1 * (alpha / sigma)[:, None], alpha, sigma)
  found = weighted_loss(parameterization, moved, x0, eps, alpha, sigma, weighting('uniform'))
  np.testing.assert_allclose(found, [0.01, 0.01], rtol=1e-10)
  huber = weighted_loss(
    parameterization, output, x0, eps, alpha, sigma,
    error=lambda a, b: pseudo_huber(a, b, 0.1),
  )
  np.testing.assert_allclose(huber, pseudo_huber(output, wanted, 0.1), rtol=1e-12)


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('name', [None, *WEIGHTINGS])
def test_zero_terminal_snr_has_finite_losses_and_gradients(prediction, name):
  """Float32, at alpha = 0 and, for all but the score, whose target is infinite, at sigma = 0."""
  last = 0.0 if prediction != 'score' else 1e-3
  alpha, sigma = jnp.array([0.0, 1.0], jnp.float32), jnp.array([1.0, last], jnp.float32)
  x0, eps = jnp.full((2, 3), 0.5, jnp.float32), jnp.full((2, 3), -0.7, jnp.float32)
  made = weighting(name) if name else None
  parameterization = Parameterization(prediction)
  loss = lambda output: weighted_loss(parameterization, output, x0, eps, alpha, sigma, made)
  value, slope = loss(x0), jax.grad(lambda output: loss(output).sum())(x0)
  assert value.shape == (2,) and value.dtype == jnp.float32
  assert np.isfinite(value).all() and np.isfinite(slope).all()
  exact = parameterization.target(x0, eps, alpha, sigma)
  np.testing.assert_array_equal(loss(exact), 0)


@pytest.mark.parametrize(
  'prediction,formula',
  [
    ('epsilon', lambda snr, g: np.minimum(snr, g) / snr),
    ('sample', lambda snr, g: np.minimum(snr, g)),
    ('v_prediction', lambda snr, g: np.minimum(snr, g) / (snr + 1)),
  ],
)
def test_min_snr_weights(prediction, formula):
  snr = np.array([1e-3, 0.5, 5.0, 7.0, 900.0])
  alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
  found = weight(min_snr(5.0), Parameterization(prediction), jnp.asarray(alpha), jnp.asarray(sigma))
  np.testing.assert_allclose(found, formula(snr, 5.0), rtol=1e-12)
  at_zero = weight(min_snr(5.0), Parameterization(prediction), jnp.zeros(1), jnp.ones(1))
  limit = 1.0 if prediction in BLIND_AT_ZERO_SNR else 0.0
  np.testing.assert_allclose(at_zero, [limit], atol=1e-8)


def test_per_example_means():
  np.testing.assert_allclose(losses.per_example(jnp.arange(6.0).reshape(2, 3, 1)), [1, 4])
