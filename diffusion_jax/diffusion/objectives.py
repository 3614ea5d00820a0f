"""Training losses of a denoising network, one value per example."""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import expand
from diffusion_jax.types import Latents, PerExample


def add_noise(x0: Latents, eps: Latents, alpha: jax.Array, sigma: jax.Array) -> Latents:
  """x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
  return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def offset_noise(key: jax.Array, shape: tuple[int, ...], strength: float) -> Latents:
  """Unit Gaussian noise [b h w c] plus `strength` times one Gaussian per image and channel.

  The offset teaches the network to move the mean of an image (Guttenberg 2023).
  """
  pixel_key, offset_key = jax.random.split(key)
  noise = jax.random.normal(pixel_key, shape)
  if strength:
    noise += strength * jax.random.normal(offset_key, (shape[0], 1, 1, shape[-1]))
  return noise


def squared_error(output: jax.Array, wanted: jax.Array) -> PerExample:
  """Mean over all but the first axis, in float32."""
  error = (output.astype(jnp.float32) - wanted.astype(jnp.float32)) ** 2
  return error.mean(axis=tuple(range(1, error.ndim)))


def min_snr_weight(prediction: str, alpha: jax.Array, sigma: jax.Array, gamma: float) -> jax.Array:
  """Weight [b] on the squared error of `prediction` (Hang et al. 2023, eq. 8 and section 3.4).

  min(SNR, gamma) on x_0's error is min(SNR, gamma) / SNR on epsilon's and min(SNR, gamma) /
  (SNR + 1) on v's. Written with alpha^2 and sigma^2 so that SNR = 0 gives no division by zero.
  """
  signal, noise = alpha**2, sigma**2
  clipped = jnp.minimum(signal / jnp.maximum(noise, 1e-20), gamma)
  if prediction == 'epsilon':
    return jnp.where(signal > 0, jnp.minimum(1.0, gamma * noise / jnp.maximum(signal, 1e-20)), 1.0)
  if prediction == 'sample':
    return clipped
  return clipped * noise / (signal + noise)
