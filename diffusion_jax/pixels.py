"""Images as arrays: bytes in [0, 255] to values in [-1, 1] and back, and another size."""

from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Array = TypeVar('Array')  # NumPy's or JAX's


def to_float(images: Array, dtype: type[np.floating] = np.float32) -> Array:
  """Map values in [0, 255] to [-1, 1] of that type; for NumPy and, inside a program, JAX."""
  return images.astype(dtype) / dtype(127.5) - 1


def to_uint8(images: Float[np.ndarray, '*shape']) -> UInt8[np.ndarray, '*shape']:
  """Map [-1, 1] to [0, 255], rounded and clipped, NaN to 0; the inverse of `to_float` for bytes."""
  values = (np.asarray(images).astype(np.float32) + 1) * 127.5
  values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
  return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def resize(
  image: UInt8[np.ndarray, 'h w c'], height: int, width: int
) -> UInt8[np.ndarray, 'height width c']:
  """Scale an image to another size; bicubic, with antialiasing."""
  flat = image[..., 0] if image.shape[-1] == 1 else image  # Pillow has no [h, w, 1].
  resized = Image.fromarray(flat).resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(resized).reshape(height, width, image.shape[-1])


def edges(image: UInt8[np.ndarray, 'h w 3']) -> UInt8[np.ndarray, 'h w 3']:
  """Edges of an image, white on black: Sobel's gradient of brightness, scaled to its maximum."""
  gray = image.astype(np.float32).mean(axis=-1)
  padded = np.pad(gray, 1, mode='edge')
  smooth = lambda x, axis: x + 2 * np.roll(x, -1, axis) + np.roll(x, -2, axis)
  difference = lambda x, axis: np.roll(x, -2, axis) - x
  h, w = gray.shape
  steps = [smooth(difference(padded, axis), 1 - axis)[:h, :w] for axis in (0, 1)]
  length = np.hypot(*steps)
  length *= 255 / max(float(length.max()), 1.0)
  return np.repeat(length.astype(np.uint8)[..., None], 3, axis=-1)
