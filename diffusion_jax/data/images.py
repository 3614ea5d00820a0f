"""A picture that a person names, as the square array that a network takes."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from diffusion_jax.data.transforms import CenterCrop, Resize
from diffusion_jax.errors import UserError

FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')
MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
MAX_PIXELS = 2**26


def read_image(path: str | Path, size: int) -> np.ndarray:
  """The picture's central square, scaled to uint8 [size size 3]; else as `read_pixels`."""
  pixels = read_pixels(path)
  # The square first: a thin strip would grow beyond all bounds if it were scaled as a whole.
  square = CenterCrop(min(pixels.shape[:2]))({'image': pixels})
  return Resize(size)(square)['image']


def read_pixels(
  source: str | Path | BinaryIO, path: str | Path = '', background: str = 'white'
) -> np.ndarray:
  """The picture at its own size, uint8 [h w 3], over a background that shows where it is clear.

  Turned upright as its EXIF data say; of several frames the first.

  Args:
    source: a file by its path, or one that is open.
    path: what an open one is called in errors.
    background: a color by name.

  Raises:
    UserError: no file, no picture in it, a damaged one, more than 8 bits a channel, or more than
      MAX_PIXELS pixels, which are not decoded.
  """
  path = path or source
  try:
    with _opened(source) as file:
      width, height = file.size
      if width * height > MAX_PIXELS:
        raise UserError(
          f'the image {path} has {width} x {height} pixels; give one of at most {MAX_PIXELS:,} '
          'pixels in all.'
        )
      if file.mode not in MODES:
        raise UserError(
          f'the image {path} has the mode {file.mode}; save it with 8 bits a channel, such as RGB.'
        )
      image = ImageOps.exif_transpose(file).convert('RGBA')
  except UserError:
    raise
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(
      f'the image {path} cannot be read ({error}); give a file of {", ".join(FORMATS)}.'
    ) from error
  below = Image.new('RGBA', image.size, background)
  return np.asarray(Image.alpha_composite(below, image).convert('RGB'))


def image_size(path: str | Path) -> tuple[int, int]:
  """(height, width) of a picture that `read_image` can read, upright."""
  with _opened(path) as file:
    width, height = file.size
    lying = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
  return (width, height) if lying else (height, width)


def _opened(path: str | Path | BinaryIO) -> Image.Image:
  """The file with its header read. Pillow's own warning of large pictures is not needed."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    return Image.open(path, formats=FORMATS)
