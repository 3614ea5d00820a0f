"""Parameterisations, weights and noise, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.denoiser import PREDICTIONS, target, text_denoiser, to_x0
from diffusion_jax.diffusion.objectives import (
  add_noise,
  min_snr_weight,
  offset_noise,
  squared_error,
)
from diffusion_jax.diffusion.schedules import Schedule, ScheduleConfig


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_a_perfect_prediction_gives_back_x0(prediction):
  key_x, key_e = jax.random.split(jax.random.key(0))
  x0, eps = jax.random.normal(key_x, (3, 4, 4, 2)), jax.random.normal(key_e, (3, 4, 4, 2))
  alpha = jnp.array([0.9, 0.5, 0.1])
  sigma = jnp.sqrt(1 - alpha**2)
  x = add_noise(x0, eps, alpha, sigma)
  output = target(prediction, x0, eps, alpha, sigma)
  np.testing.assert_allclose(to_x0(prediction, output, x, alpha, sigma), x0, atol=1e-5)


def test_v_target_by_hand():
  out = target(
    'v_prediction', jnp.array([[2.0]]), jnp.array([[3.0]]), jnp.array([0.8]), jnp.array([0.6])
  )
  np.testing.assert_allclose(out, [[0.8 * 3 - 0.6 * 2]], rtol=1e-6)


@pytest.mark.parametrize(
  'prediction,weight',
  [
    ('epsilon', lambda snr, g: np.minimum(snr, g) / snr),
    ('sample', lambda snr, g: np.minimum(snr, g)),
    ('v_prediction', lambda snr, g: np.minimum(snr, g) / (snr + 1)),
  ],
)
def test_min_snr_weights(prediction, weight):
  snr = np.array([1e-3, 0.5, 5.0, 7.0, 900.0])
  alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
  found = min_snr_weight(prediction, jnp.asarray(alpha), jnp.asarray(sigma), 5.0)
  np.testing.assert_allclose(found, weight(snr, 5.0), rtol=1e-4)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_min_snr_is_finite_at_zero_terminal_snr(prediction):
  weight = min_snr_weight(prediction, jnp.array([0.0]), jnp.array([1.0]), 5.0)
  np.testing.assert_allclose(weight, [1.0 if prediction == 'epsilon' else 0.0])


def test_offset_noise_shares_one_offset_per_image_and_channel():
  noise = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.5)
  np.testing.assert_allclose(noise.var(), 1.25, rtol=0.02)
  # The mean over 64 pixels keeps the offset (0.25) and 1/64 of the pixel noise.
  np.testing.assert_allclose(noise.mean(axis=(1, 2)).var(), 0.25 + 1 / 64, rtol=0.08)
  plain = offset_noise(jax.random.key(0), (2000, 8, 8, 2), 0.0)
  np.testing.assert_allclose(plain.mean(axis=(1, 2)).var(), 1 / 64, rtol=0.08)


def test_squared_error_is_per_example():
  x = jnp.stack([jnp.zeros((2, 2, 1)), jnp.full((2, 2, 1), 3.0)])
  np.testing.assert_allclose(squared_error(x, jnp.ones_like(x)), [1.0, 4.0])


def test_the_denoiser_hands_the_network_its_timestep():
  schedule = Schedule(ScheduleConfig())
  seen = []

  def network(x, t, text):
    seen.append(t)
    return jnp.zeros_like(x)

  alpha, sigma = schedule(jnp.array(321))
  x = jnp.ones((2, 1, 1, 1))
  x0 = text_denoiser(network, schedule, 'epsilon')(x, alpha, sigma, None)
  np.testing.assert_allclose(seen[0], [321, 321], atol=0.02)
  np.testing.assert_allclose(x0, x / alpha, rtol=1e-6)
