"""Pictures that people have, as arrays of 8 bits a channel."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from diffusion_jax.data.eight_bits import WITH_RANGE, as_rgb, scaled
from diffusion_jax.data.picture_files import (
  FORMATS,
  Header,
  as_it_lies,
  corner_as_it_lies,
  is_swapped,
  opened,
  read_header,
)
from diffusion_jax.data.png_strips import PngStrips
from diffusion_jax.data.transforms import Resize
from diffusion_jax.errors import Unreadable

MAX_PIXELS, MAX_EDGE = 2**28, 2**20
"""Pictures with more are taken for decompression bombs and not decoded."""
LARGE = 2**26
"""Pixels from which on a picture is read at a half, a quarter and so on of its size."""
_REDUCED = 2**24
"""Pixels that are left of a large picture, at most."""
_MEMORY = 2**30
"""Bytes that decoding a large picture may take where its format cannot be decoded in parts."""
_WHOLE = {'WEBP': 16, 'TIFF': 8, 'BMP': 4, 'GIF': 4}
"""Bytes for each pixel that Pillow takes to decode a picture whole, with its copies."""
_DRAFT = 8
"""The most by which JPEGs can be divided while they are decoded."""
_STRIP = 2**20
"""Pixels that are converted at a time."""


def read_image(path: str | Path, size: int) -> np.ndarray:
  """The picture's central square, scaled to uint8 [size size 3]; else as `read_pixels`."""
  # The square first: a thin strip would grow beyond all bounds if it were scaled as a whole.
  return Resize(size)({'image': _read(path, path, square=True)})['image']


def read_pixels(
  source: str | Path | BinaryIO, path: str | Path = '', background: str = 'white'
) -> np.ndarray:
  """The picture, uint8 [h w 3], upright, over a background that shows where it is clear.

  Of several frames the first. It has its own size, but if there are LARGE pixels or more: then
  both edges are divided by the first of 2, 4, ... that leaves 2**24 pixels or fewer. While it is
  read it takes 8 bytes of memory for each pixel (11 if it is a progressive JPEG, 16 if WebP), but
  of LARGE pixels or more 0.3 GB in all, or 1.1 GB where the format can only be decoded whole:
  progressive JPEG, interlaced PNG, PNG with 16 bits in each of several channels, WebP, TIFF, BMP.

  Args:
    source: a file by its path, or one that is open.
    path: what an open one is called in errors.
    background: a color by name.

  Raises:
    Unreadable: no file, no regular one, no picture in it, a damaged one, one with more than
      MAX_PIXELS pixels, or one that would take too much memory.
  """
  return _read(source, path or source, square=False, background=background)


def image_size(path: str | Path) -> tuple[int, int]:
  """(height, width) of the upright picture in a file, of which the header is read alone.

  Raises:
    Unreadable: as `read_pixels`, but for damage after the header.
  """
  with _named(path), opened(path) as file:
    return read_header(file).upright


@contextlib.contextmanager
def _named(name: str | Path) -> Iterator[None]:
  """Makes a sentence of whatever goes wrong with a picture."""
  try:
    yield
  except Unreadable:
    raise
  except Exception as error:  # Decoders let through whatever damaged data make of them.
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    raise Unreadable(
      f'the image {name} cannot be read ({" ".join(reason.split())[:200]}); give a file of '
      f'{", ".join(FORMATS)}.'
    ) from error


def _read(
  source: str | Path | BinaryIO, name: str | Path, square: bool, background: str = 'white'
) -> np.ndarray:
  with _named(name), opened(source) as file:
    header = read_header(file)
    _check_size(header, name)
    return _decoded(header, square, background)


def _check_size(header: Header, name: str | Path) -> None:
  height, width = header.height, header.width
  pixels, most = height * width, max(height, width)
  if pixels > MAX_PIXELS or (pixels >= LARGE and most > MAX_EDGE):
    raise Unreadable(
      f'the image {name} has {width} x {height} pixels; give one of at most {MAX_PIXELS:,} '
      f'pixels in all and {MAX_EDGE:,} along an edge.'
    )
  if pixels >= LARGE and _whole_bytes(header) > _MEMORY:
    raise Unreadable(
      f'the image {name} has {width} x {height} pixels and cannot be decoded in parts; save it as '
      'a JPEG that is not progressive, or as a PNG of 8 bits that is not interlaced.'
    )


def _whole_bytes(header: Header) -> int:
  """What decoding a large picture takes where it has to be decoded whole, else 0."""
  image, pixels = header.image, header.height * header.width
  if header.png:
    return 0 if PngStrips(header.png).fits else 4 * pixels
  if image.format == 'JPEG':
    if not image.info.get('progressive'):
      return 0
    finest = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
    return 2 * pixels * sum(h * v for _, h, v, _ in image.layer) // finest  # All coefficients.
  return pixels * _WHOLE[image.format]


def _decoded(header: Header, square: bool, background: str) -> np.ndarray:
  """The pixels of a picture or of its central square, upright; reduced, if it is large."""
  image, factor = header.image, _factor(header, square)
  if factor > 1 and image.format == 'JPEG':
    image.draft(None, (header.width // factor, header.height // factor))
    header = header._replace(height=image.height, width=image.width)
    factor //= min(factor, _DRAFT)
  box, turned = _box(header, square), header.orientation
  shape = (-(-box[2] // factor), -(-box[3] // factor))
  pixels = np.empty((*(shape[::-1] if is_swapped(turned) else shape), 3), np.uint8)
  lying = as_it_lies(pixels, turned)
  step = max(_STRIP // header.width // factor, 1) * factor
  for start, strip in _strips(header, box, step):
    found = np.asarray(as_rgb(strip, background).reduce(factor))
    lying[start // factor : start // factor + len(found)] = found
  return pixels


def _factor(header: Header, square: bool) -> int:
  """By which both edges are divided: 1, 2, 4 and so on."""
  height, width, factor = header.height, header.width, 1
  if height * width < LARGE:
    return factor
  rows, columns = (min(height, width),) * 2 if square else (height, width)
  while (
    -(-rows // factor) * -(-columns // factor) > _REDUCED
    or (header.image.format == 'JPEG' and height * width // factor**2 >= LARGE)
  ):
    factor *= 2
  return factor


def _box(header: Header, square: bool) -> tuple[int, int, int, int]:
  """(top, left, height, width), in the picture as it lies, of all of it or its upright square."""
  if not square:
    return 0, 0, header.height, header.width
  height, width = header.upright
  edge = min(height, width)
  rest = (height - edge, width - edge)
  top, left = corner_as_it_lies((rest[0] // 2, rest[1] // 2), rest, header.orientation)
  return top, left, edge, edge


def _strips(
  header: Header, box: tuple[int, int, int, int], step: int
) -> Iterator[tuple[int, Image.Image]]:
  """(first row, strip of so many rows) of the box; rows are counted from its top."""
  top, left, rows, columns = box
  image = header.image
  if header.png and header.height * header.width >= LARGE and PngStrips(header.png).fits:
    start = -top
    for strip in PngStrips(header.png)(step, top % step):
      height = min(strip.height, rows - start)
      if start >= 0 and height > 0:
        yield start, strip.crop((left, 0, left + columns, height))
      start += strip.height
    return
  image.load()
  extrema = image.getextrema() if image.mode in WITH_RANGE else None
  for start in range(0, rows, step):
    stop = min(start + step, rows)
    strip = image.crop((left, top + start, left + columns, top + stop))
    yield start, scaled(strip, extrema) if extrema else strip
