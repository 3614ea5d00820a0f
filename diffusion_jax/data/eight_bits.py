"""Pictures of every mode that Pillow has as RGB of 8 bits."""

import functools

import numpy as np
from PIL import Image, ImageCms

WITH_RANGE = ('I', 'F')
"""Modes whose values have no range of their own."""
_OPAQUE = ('1', 'L', 'RGB', 'CMYK', 'YCbCr')
_RANGES = (255.0, 65535.0, 2.0**32 - 1)


def as_rgb(image: Image.Image, background: str = 'white') -> Image.Image:
  """The picture as RGB over a background of that name; of 16 bits, 65535 becomes 255.

  Those of the modes WITH_RANGE are to be `scaled` first. ValueError for what cannot be converted.
  """
  if image.mode.startswith('I;16'):
    return _from_sixteen(image, background)
  if image.mode == 'LAB':
    return ImageCms.applyTransform(image, _from_lab())
  if image.mode in _OPAQUE and 'transparency' not in image.info:
    return image.convert('RGB')
  image = image.convert('RGBA')
  return Image.alpha_composite(Image.new('RGBA', image.size, background), image).convert('RGB')


def scaled(image: Image.Image, extrema: tuple[float, float]) -> Image.Image:
  """Numbers of 32 bits as 8 bits of gray.

  Scaled from the first of the usual ranges that holds them all ([0, 1] for floats, then 8, 16 and
  32 bits), or, if some are below 0, from the lowest to the highest.

  Args:
    extrema: of the values, lowest and highest; of the whole picture, where `image` is part of one.
  """
  values, (low, high) = np.asarray(image), extrema
  if not np.isfinite(extrema).all():
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
  if low >= 0:
    ranges = (1.0, *_RANGES) if image.mode == 'F' else _RANGES
    low, high = 0.0, next((top for top in ranges if high <= top), high)
  shares = (np.nan_to_num(values.astype(np.float64), nan=low) - low) / max(high - low, 1e-30)
  return Image.fromarray(np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8))


def _from_sixteen(image: Image.Image, background: str) -> Image.Image:
  values = np.asarray(image).astype(np.uint32)
  gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
  clear = image.info.get('transparency')
  if isinstance(clear, int):
    opaque = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    ground = Image.new('RGB', image.size, background)
    return Image.composite(Image.fromarray(gray).convert('RGB'), ground, opaque)
  return Image.fromarray(gray).convert('RGB')


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
  lab, rgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
  return ImageCms.buildTransform(lab, rgb, 'LAB', 'RGB')
