"""Pictures of any usual format and mode as arrays of 8 bits a channel, in bounded memory.
"""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import (
  BmpImagePlugin,
  ExifTags,
  GifImagePlugin,
  Image,
  ImageCms,
  ImageFile,
  JpegImagePlugin,
  PngImagePlugin,
  TiffImagePlugin,
  WebPImagePlugin,
)

from diffusion_jax.data.png import SIGNATURE, Joined, PngStrips, without_extras
from diffusion_jax.data.transforms import Resize
from diffusion_jax.errors import Unreadable

WITH_RANGE = ('I', 'F')
"""Modes whose values have no range of their own."""
_OPAQUE = ('1', 'L', 'RGB', 'CMYK', 'YCbCr')
_RANGES = (255.0, 65535.0, 2.0**32 - 1)


def as_rgb(image: Image.Image, background: str = 'white') -> Image.Image:
  """Return a picture as RGB over a background of that name; of 16 bits, 65535 becomes 255.

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
  """Return numbers of 32 bits as 8 bits of gray.

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
  fractions = (np.nan_to_num(values.astype(np.float64), nan=low) - low) / max(high - low, 1e-30)
  return Image.fromarray(np.rint(np.clip(fractions, 0, 1) * 255).astype(np.uint8))


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


FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')
_STARTS = {
  'PNG': (SIGNATURE,), 'JPEG': (b'\xff\xd8\xff',), 'BMP': (b'BM',), 'GIF': (b'GIF87a', b'GIF89a'),
  'TIFF': tuple(TiffImagePlugin.PREFIXES),
}
_TURNS = {
  1: (False, False, False), 2: (False, True, False), 3: (True, True, False),
  4: (True, False, False), 5: (False, False, True), 6: (False, True, True),
  7: (True, True, True), 8: (True, False, True),
}
"""EXIF's orientations: which axes of the upright picture are mirrored, and whether they are then
swapped, to give the picture as it lies in the file."""
_WIDTH, _HEIGHT = 256, 257
MOST_BYTES = 2**28
"""Of a file that is read whole, for which no picture has use."""


class _Tiff(TiffImagePlugin.TiffImageFile):
  """A TIFF whose pixels stay as they lie, for Pillow turns those of this format alone by itself."""

  def load_end(self) -> None:
    pass


_OPENERS = {
  'PNG': PngImagePlugin.PngImageFile, 'JPEG': JpegImagePlugin.JpegImageFile,
  'WEBP': WebPImagePlugin.WebPImageFile, 'BMP': BmpImagePlugin.BmpImageFile,
  'GIF': GifImagePlugin.GifImageFile, 'TIFF': _Tiff,
}


@contextlib.contextmanager
def opened(source: str | Path | BinaryIO) -> Iterator[BinaryIO]:
  """Open a file at its start. OSError for what is no regular file, which is not opened."""
  if not isinstance(source, str | os.PathLike):
    source.seek(0)
    yield source
    return
  # A pipe would wait for a writer for ever, and a device may do anything.
  if not stat.S_ISREG(os.stat(source).st_mode):
    raise OSError('it is not a regular file')
  with open(source, 'rb') as file:
    yield file


class Header(NamedTuple):
  """A picture of which the header is read, and its pixels are not.

  height, width: as it lies in the file. orientation: as EXIF counts it, 1 to 8. png: its chunks,
  of a PNG.
  """

  image: ImageFile.ImageFile
  height: int
  width: int
  orientation: int
  png: Joined | None

  @property
  def upright(self) -> tuple[int, int]:
    """(height, width) of the upright picture."""
    swapped = is_swapped(self.orientation)
    return (self.width, self.height) if swapped else (self.height, self.width)


def read_header(file: BinaryIO) -> Header:
  """Read the header of a picture. ValueError where a file begins like none, or what Pillow raises.

  Pillow's own limit of a picture's size is not asked.
  """
  kind, png = _kind(file), None
  if not kind:
    raise ValueError('it begins like no picture')
  if kind == 'WEBP' and file.seek(0, io.SEEK_END) > MOST_BYTES:  # Pillow reads them whole.
    raise ValueError(f'it has more than {MOST_BYTES:,} bytes')
  if kind == 'PNG':
    png = without_extras(file)
  file.seek(0)
  image = _OPENERS[kind](io.BufferedReader(png) if png else file)
  if kind == 'TIFF':  # Its `size` is upright in some versions of Pillow.
    height, width = int(image.tag_v2[_HEIGHT]), int(image.tag_v2[_WIDTH])
  else:
    height, width = image.height, image.width
  return Header(image, height, width, _orientation(image), png)


def _orientation(image: ImageFile.ImageFile) -> int:
  try:
    # Pillow's own method for PNGs decodes those that have no EXIF data before their pixels.
    tags = image.tag_v2 if isinstance(image, _Tiff) else Image.Image.getexif(image)
    found = tags.get(ExifTags.Base.Orientation)
  except Exception:  # Whatever damaged EXIF data make of Pillow, the pixels are sound.
    return 1
  return found if isinstance(found, int) and found in _TURNS else 1


def as_it_lies(upright: np.ndarray, orientation: int) -> np.ndarray:
  """Return a view of an upright array [h w ...] with the axes of the stored picture."""
  rows, columns, swapped = _TURNS[orientation]
  view = upright[:: -1 if rows else 1, :: -1 if columns else 1]
  return view.swapaxes(0, 1) if swapped else view


def corner_as_it_lies(
  corner: tuple[int, int], rest: tuple[int, int], orientation: int
) -> tuple[int, int]:
  """Return where the upper left corner (row, column) of a part of an upright picture is stored.

  rest: by how much the picture is higher and wider than the part.
  """
  *mirrored, swapped = _TURNS[orientation]
  places = [r - c if m else c for c, r, m in zip(corner, rest, mirrored, strict=True)]
  return tuple(places[::-1] if swapped else places)


def is_swapped(orientation: int) -> bool:
  """Return whether the upright picture is as high as the stored one is wide."""
  return _TURNS[orientation][2]


def _kind(file: BinaryIO) -> str:
  file.seek(0)
  start = file.read(16)
  file.seek(0)
  if start[:4] == b'RIFF' and start[8:12] == b'WEBP':
    return 'WEBP'
  return next((kind for kind, starts in _STARTS.items() if start.startswith(starts)), '')


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
  """Return the central square, scaled to uint8 [size size 3]; else as `read_pixels`."""
  # The square first: a thin strip would grow beyond all bounds if it were scaled as a whole.
  return Resize(size)({'image': _read(path, path, square=True)})['image']


def read_pixels(
  source: str | Path | BinaryIO, path: str | Path = '', background: str = 'white'
) -> np.ndarray:
  """Return a picture, uint8 [h w 3], upright, over a background that shows where it is clear.

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
  """Return (height, width) of the upright picture in a file, of which only the header is read.

  Raises:
    Unreadable: as `read_pixels`, but for damage after the header.
  """
  with _named(path), opened(path) as file:
    return read_header(file).upright


@contextlib.contextmanager
def _named(name: str | Path) -> Iterator[None]:
  """Make a sentence of whatever goes wrong with a picture."""
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
  """Bytes that decoding a large picture takes where it has to be decoded whole, else 0."""
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
