"""How alike two images are, pixel by pixel: for reconstructions. Images are in [-1, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import HIGHER, LOWER, Metric, Value, of_each

_WINDOW, _SIGMA = 11, 1.5
_PEAK = 2.0  # The range of the values.


def psnr_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Peak signal-to-noise ratio of each pair of images in dB, 10 log10(2^2 / mean squared error).

  Infinite where an image is reproduced exactly. UserError if there are no images or the shapes
  differ.
  """
  x, y = (np.asarray(v, np.float64) for v in _pairs(x, y, 'PSNR'))
  error = np.mean((x - y) ** 2, axis=tuple(range(1, x.ndim)))
  with np.errstate(divide='ignore'):
    return 10 * np.log10(_PEAK**2 / error)


def psnr(x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']) -> float:
  """Mean of `psnr_of_each`; infinite as soon as one image is reproduced exactly."""
  return float(np.mean(psnr_of_each(x, y)))


def l1_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Mean absolute difference of each pair of images, of values in [-1, 1]. UserError as in PSNR."""
  x, y = (np.asarray(v, np.float64) for v in _pairs(x, y, 'L1'))
  return np.abs(x - y).mean(axis=tuple(range(1, x.ndim)))


def ssim_of_each(
  x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']
) -> Float[np.ndarray, 'b']:
  """Structural similarity of each pair of images, in [-1, 1] (Wang et al. 2004, eq. 13).

  Means and (co)variances are weighted by a Gaussian of sigma 1.5 over 11 x 11 pixels, for each
  channel by itself, with K1 = 0.01 and K2 = 0.03; the average is over the windows that lie within
  the image and over channels. That is scikit-image's structural_similarity with
  gaussian_weights=True, sigma=1.5, use_sample_covariance=False and data_range=2. On the device.

  Raises:
    UserError: no images, different shapes, or images smaller than 11 pixels.
  """
  x, y = _pairs(x, y, 'SSIM')
  if x.ndim != 4 or min(x.shape[1:3]) < _WINDOW:
    raise UserError(
      f'SSIM needs images [b h w c] of {_WINDOW} pixels or more, not {list(x.shape)}.'
    )
  return np.asarray(_ssim(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), np.float64)


def ssim(x: Float[np.ndarray, 'b h w c'], y: Float[np.ndarray, 'b h w c']) -> float:
  """Mean of `ssim_of_each`."""
  return float(np.mean(ssim_of_each(x, y)))


@jax.jit
def _ssim(x: Float[Array, 'b h w c'], y: Float[Array, 'b h w c']) -> Float[Array, 'b']:
  c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
  # Variances are differences of squares: near the channel's mean those lose few digits.
  centre = x.mean(axis=(1, 2), keepdims=True)
  x, y = x - centre, y - centre
  blur = lambda v: _along(_along(v, 1), 2)
  mean_x, mean_y = blur(x), blur(y)
  variances = blur(x * x + y * y) - mean_x**2 - mean_y**2
  covariance = blur(x * y) - mean_x * mean_y
  mean_x, mean_y = mean_x + centre, mean_y + centre
  luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
  structure = (2 * covariance + c2) / (variances + c2)
  return (luminance * structure).mean(axis=(1, 2, 3))


def _along(x: Float[Array, 'b h w c'], axis: int) -> Float[Array, 'b h w c']:
  """Weighted sums over windows along an axis, as a product with a banded matrix."""
  size = x.shape[axis]
  offsets = np.arange(_WINDOW) - _WINDOW // 2
  weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
  band = np.zeros((size - _WINDOW + 1, size), np.float32)
  for i in range(len(band)):
    band[i, i : i + _WINDOW] = weights / weights.sum()
  out = jnp.tensordot(x, band, axes=((axis,), (1,)), precision='highest')
  return jnp.moveaxis(out, -1, axis)


def _pairs(x: np.ndarray, y: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
  if x.shape != y.shape or x.ndim < 2 or x.size == 0:
    raise UserError(
      f'{name} compares two equal, non-empty batches of images, not {list(x.shape)} with '
      f'{list(y.shape)}: give originals and reconstructions in pairs.'
    )
  return x, y


DISCRETE_BITS = 'latent_bits_per_dim_discrete'
_OF_REFERENCE = ('reference', 'reference_images')


def _of_pairs(name: str, title: str, better: str, source: str = 'an autoencoder') -> Metric:
  return Metric(name, of_each, (name,), (), title, better, _OF_REFERENCE, source=source)


PSNR = _of_pairs('psnr', 'PSNR, dB', HIGHER)
SSIM = _of_pairs('ssim', 'SSIM', HIGHER)
L1 = _of_pairs('l1', 'L1 distance, pixels in [-1, 1]', LOWER)
LPIPS = _of_pairs('lpips', 'LPIPS', LOWER, 'an autoencoder, and --lpips')
BITS_PER_DIM = Metric(
  'bits_per_dim', of_each, (DISCRETE_BITS,), (), comparable_on=(),
  source='a diffusion model and images to draw', values=(
    Value(DISCRETE_BITS, 'Bits per dimension of latents, discrete bound', LOWER),
  ),
)
