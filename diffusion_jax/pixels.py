"""Images as arrays: bytes in [0, 255] to values in [-1, 1] and back, and another size."""

import math
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


def central_crop(
  pixels: np.ndarray, frame: tuple[int, int], size: tuple[int, int],
  filtered: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
  """Return the middle of a frame (height, width) out of pixels [h w 3] laid over it, [*size 3]."""
  height, width = size
  wide = frame[0] * width <= frame[1] * height
  sides = (frame[0], frame[0] * width / height) if wide else (frame[1] * height / width, frame[1])
  lows = [(whole - side) // 2 for whole, side in zip(frame, sides, strict=True)]
  scales = [own / whole for own, whole in zip(pixels.shape, frame, strict=False)]
  top, left = (low * scale for low, scale in zip(lows, scales, strict=True))
  bottom, right = (
    (low + side) * scale for low, side, scale in zip(lows, sides, scales, strict=True)
  )
  y, x = math.floor(top), math.floor(left)
  # Cut first, so that nothing beyond the rectangle shows in it.
  cut = Image.fromarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
  box = (left - x, top - y, min(right - x, cut.width), min(bottom - y, cut.height))
  return np.asarray(cut.resize((width, height), filtered, box))


LONGEST = 4.0
"""The largest ratio of the edges of a size that follows a picture's."""


def size_like(
  height: int, width: int, area: int, multiple: int, most: int | None = None
) -> tuple[int, int]:
  """Return the size of multiples that is nearest to the aspect of height x width and to the area.

  No edge is above `most`, where that is given, and every multiple fits once.
  An error in the aspect counts twice one in the area, both as ratios; an aspect beyond LONGEST is
  taken for that.
  """
  aspect = min(max(height / width, 1 / LONGEST), LONGEST)
  if most:
    area = min(area, most**2 * min(aspect, 1 / aspect))
  rows = math.sqrt(area * aspect) / multiple
  best, least = (1, 1), math.inf
  for h in range(max(1, math.floor(rows * 0.75)), max(1, math.ceil(rows * 1.3)) + 1):
    for w in {max(1, math.floor(h / aspect)), math.ceil(h / aspect)}:
      if most and max(h, w) * multiple > most:
        continue
      error = 2 * abs(math.log(h / w / aspect)) + abs(math.log(h * w * multiple**2 / area))
      if error < least - 1e-9:
        best, least = (h, w), error
  return best[0] * multiple, best[1] * multiple


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
