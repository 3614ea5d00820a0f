"""Images from files of any usual format and mode, as 8 bits a channel, in bounded memory."""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

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

from diffusion_jax.data.png import SIGNATURE, without_extras
from diffusion_jax.data.profiles import to_srgb
from diffusion_jax.errors import Unreadable
from diffusion_jax.pixels import LONGEST, central_crop, resize

T = TypeVar('T')

MAX_PIXELS, MAX_EDGE = 2**28, 2**20
"""Images with more are taken for decompression bombs and not decoded."""
MOST_BYTES = 2**28
"""Most bytes of a file that is read whole."""
LARGE = 2**26
"""Pixels from which on an image is read at a half, a quarter and so on of its size."""
_REDUCED = 2**24
"""Pixels that are left of a large image, at most."""
_MEMORY = 2**30
"""Bytes that decoding a large image may take."""
_WHOLE = {'PNG': 4, 'WEBP': 16, 'TIFF': 8, 'BMP': 4, 'GIF': 4}
"""Bytes for each pixel that Pillow takes to decode an image, with its copies; of JPEGs, see below.
"""
_DRAFT = 8
"""The most by which JPEGs can be divided while they are decoded."""
_STRIP = 2**20
"""Pixels that are converted at a time."""


class _Tiff(TiffImagePlugin.TiffImageFile):
  """A TIFF whose pixels stay as they lie, for Pillow turns those of this format alone by itself."""

  def load_end(self) -> None:
    pass


_FORMATS = {
  'PNG': (PngImagePlugin.PngImageFile, (SIGNATURE,)),
  'JPEG': (JpegImagePlugin.JpegImageFile, (b'\xff\xd8\xff',)),
  'WEBP': (WebPImagePlugin.WebPImageFile, (b'RIFF',)),
  'BMP': (BmpImagePlugin.BmpImageFile, (b'BM',)),
  'GIF': (GifImagePlugin.GifImageFile, (b'GIF87a', b'GIF89a')),
  'TIFF': (_Tiff, tuple(TiffImagePlugin.PREFIXES)),
}
"""Format -> (Pillow's reader, how its files begin)."""
_START = 32
"""Bytes by which a format is known."""
_EDGES = {'PNG': (slice(16, 20), slice(20, 24)), 'GIF': (slice(6, 8), slice(8, 10))}
"""Where width and height stand among them."""
_TURNS = {
  1: (False, False, False), 2: (False, True, False), 3: (True, True, False),
  4: (True, False, False), 5: (False, False, True), 6: (False, True, True),
  7: (True, True, True), 8: (True, False, True),
}
"""EXIF's orientations: which axes of the upright image are mirrored, and whether they are then
swapped, to give the image as it lies in the file."""
_WIDTH, _HEIGHT = 256, 257


def read_square(
  source: str | Path | BinaryIO, size: int, name: str | Path = '', background: str = 'white'
) -> tuple[np.ndarray, tuple[int, int]]:
  """(the central square, uint8 [size size 3], the image's (height, width)); or Unreadable.

  source, name: a path, or an open file that errors call `name`. background: as of `read_pixels`.
  """
  # The square first: a thin strip would grow beyond all bounds if it were scaled as a whole.
  square, upright = _read(
    source, name or source, lambda header: (_decoded(header, True, background), header.upright)
  )
  return (square if len(square) == size else resize(square, size, size)), upright


def read_middle(
  source: str | Path | BinaryIO, height: int, width: int, name: str | Path = '',
  background: str = 'white',
) -> tuple[np.ndarray, tuple[int, int]]:
  """Return the image scaled until it covers height x width, of that its middle, uint8
  [height width 3], and (height, width) of the image; the arguments are those of `read_square`.

  Raises:
    Unreadable: as `read_pixels`.
  """
  if height == width:
    return read_square(source, height, name, background)
  pixels, upright = _read(
    source, name or source, lambda header: (_decoded(header, False, background), header.upright)
  )
  return central_crop(pixels, pixels.shape[:2], (height, width)), upright


def read_covering(
  source: str | Path | BinaryIO, height: int, width: int, name: str | Path = '',
  background: str = 'white',
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
  """Return the image scaled until it just covers height x width, uint8 [h w 3], (height, width) of
  the image, and of it once it is scaled; the arguments are those of `read_square`.

  Of an image whose ratio is more than LONGEST times that of the size the middle alone is returned,
  for a thin strip would grow beyond all bounds.

  Raises:
    Unreadable: as `read_pixels`.
  """
  pixels, upright = _read(
    source, name or source, lambda header: (_decoded(header, False, background), header.upright)
  )
  edges, wanted = np.array(pixels.shape[:2]), np.array([height, width])
  scale = (wanted / edges).max()
  most = np.minimum(np.ceil(wanted * LONGEST / scale).astype(int), edges)
  top, left = (edges - most) // 2
  kept = pixels[top : top + most[0], left : left + most[1]]
  size = np.maximum(np.rint(most * scale).astype(int), wanted)
  scaled = edges * size / most
  return resize(kept, *size.tolist()), upright, (float(scaled[0]), float(scaled[1]))


def read_size(source: str | Path | BinaryIO, name: str | Path = '') -> tuple[int, int]:
  """Return (height, width) of an image as `read_pixels` turns it; none of its pixels is read.

  Raises:
    Unreadable: as `read_pixels`, but for damage beyond the header.
  """
  return _read(source, name or source, lambda header: header.upright)


def read_pixels(
  source: str | Path | BinaryIO, path: str | Path = '', background: str = 'white'
) -> np.ndarray:
  """An image or first frame, uint8 [h w 3], upright, over a background where it is transparent.

  At its own size, but for LARGE pixels or more: then both edges are divided by the first of 2, 4,
  ... that leaves 2**24 pixels or fewer. Reading takes 8 bytes a pixel (11 for a progressive JPEG,
  16 for WebP), of LARGE pixels or more at most 1.1 GB, 0.3 GB for a JPEG that is not progressive.

  source: a path, or an open file that errors call `path`. background: a color by name. Unreadable:
  no regular file, no or a damaged image, more than MAX_PIXELS pixels, or too much memory.
  """
  return _read(source, path or source, lambda header: _decoded(header, False, background))


def _read(source: str | Path | BinaryIO, name: str | Path, decode: Callable[['_Header'], T]) -> T:
  try:
    with _opened(source) as file:
      header = _read_header(file)
      _check_size(header, name)
      return decode(header)
  except Unreadable:
    raise
  except Exception as error:  # Decoders let through whatever damaged data make of them.
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    raise Unreadable(
      f'the image {name} cannot be read ({" ".join(reason.split())[:200]}); give a file of '
      f'{", ".join(_FORMATS)}.', _cause(error)
    ) from error


def _cause(error: Exception) -> str:
  """What is wrong with a file, in few words; Pillow's errors say it in many."""
  if isinstance(error, FileNotFoundError):
    return 'missing'
  if isinstance(error, OSError) and error.errno:
    return 'not readable'
  text = str(error).lower()
  known = {
    'is empty': 'empty', 'no pixels': 'zero size', 'begins like': 'no picture',
    'truncated': 'truncated',
  }
  return next((cause for part, cause in known.items() if part in text), 'damaged')


@contextlib.contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[BinaryIO]:
  if not isinstance(source, str | os.PathLike):
    yield source
    return
  # A pipe would wait for a writer for ever, and a device may do anything.
  if not stat.S_ISREG(os.stat(source).st_mode):
    raise OSError('it is not a regular file')
  with open(source, 'rb') as file:
    yield file


class _Header(NamedTuple):
  """An image, pixels unread; height, width: as in the file; orientation: EXIF's."""

  image: ImageFile.ImageFile
  height: int
  width: int
  orientation: int

  @property
  def swapped(self) -> bool:
    return _TURNS[self.orientation][2]

  @property
  def upright(self) -> tuple[int, int]:
    return (self.width, self.height) if self.swapped else (self.height, self.width)


def format_of(start: bytes) -> str:
  """The format of a file that starts so, such as 'PNG'; '' for none that is read here."""
  kind = next((k for k, (_, starts) in _FORMATS.items() if start.startswith(starts)), '')
  return '' if kind == 'WEBP' and start[8:12] != b'WEBP' else kind


def _read_header(file: BinaryIO) -> _Header:
  """Read the header; Pillow's own limit of an image's size is not asked."""
  file.seek(0)
  start = file.read(_START)
  kind = format_of(start)
  if not start:
    raise ValueError('it is empty')
  if not kind:
    raise ValueError('it begins like no picture')
  if kind in _EDGES and not all(any(start[part]) for part in _EDGES[kind]):
    raise ValueError('it has no pixels')  # Of which Pillow says that it is not of its format.
  if kind == 'WEBP' and file.seek(0, io.SEEK_END) > MOST_BYTES:  # Pillow reads them whole.
    raise ValueError(f'it has more than {MOST_BYTES:,} bytes')
  if kind == 'PNG':
    file = io.BufferedReader(without_extras(file))
  file.seek(0)
  image = _FORMATS[kind][0](file)
  if kind == 'TIFF':  # Its `size` is upright in some versions of Pillow.
    height, width = int(image.tag_v2[_HEIGHT]), int(image.tag_v2[_WIDTH])
  else:
    height, width = image.height, image.width
  return _Header(image, height, width, _orientation(image))


def _orientation(image: ImageFile.ImageFile) -> int:
  try:
    # Pillow's own method for PNGs decodes those that have no EXIF data before their pixels.
    tags = image.tag_v2 if isinstance(image, _Tiff) else Image.Image.getexif(image)
    found = tags.get(ExifTags.Base.Orientation)
  except Exception:  # Whatever damaged EXIF data make of Pillow, the pixels are sound.
    return 1
  return found if isinstance(found, int) and found in _TURNS else 1


def _check_size(header: _Header, name: str | Path) -> None:
  height, width = header.height, header.width
  pixels, most = height * width, max(height, width)
  if pixels < 1:
    raise Unreadable(f'the image {name} has {width} x {height} pixels; leave it out.', 'zero size')
  if pixels > MAX_PIXELS or (pixels >= LARGE and most > MAX_EDGE):
    raise Unreadable(
      f'the image {name} has {width} x {height} pixels; give one of at most {MAX_PIXELS:,} '
      f'pixels in all and {MAX_EDGE:,} along an edge.', 'too large'
    )
  if pixels >= LARGE and _bytes_of(header.image, pixels) > _MEMORY:
    raise Unreadable(
      f'the image {name} has {width} x {height} pixels and would take too much memory; save it as '
      'a PNG, or as a JPEG that is not progressive.', 'too large'
    )


def _bytes_of(image: ImageFile.ImageFile, pixels: int) -> int:
  """Bytes that decoding a large image takes; JPEGs are made smaller meanwhile."""
  if image.format != 'JPEG':
    return pixels * _WHOLE[image.format]
  if not image.info.get('progressive'):
    return 0
  finest = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
  return 2 * pixels * sum(h * v for _, h, v, _ in image.layer) // finest  # All coefficients.


def _decoded(header: _Header, square: bool, background: str = 'white') -> np.ndarray:
  """The pixels of an image or of its central square, upright; reduced, if it is large."""
  image, factor = header.image, _factor(header, square)
  if factor > 1 and image.format == 'JPEG':
    image.draft(None, (header.width // factor, header.height // factor))
    header = header._replace(height=image.height, width=image.width)
    factor //= min(factor, _DRAFT)
  top, left, rows, columns = _box(header) if square else (0, 0, header.height, header.width)
  shape = (-(-rows // factor), -(-columns // factor))
  pixels = np.empty((*(shape[::-1] if header.swapped else shape), 3), np.uint8)
  lying = _as_it_lies(pixels, header.orientation)
  image.load()
  extrema = image.getextrema() if image.mode in _WITHOUT_RANGE else None
  step = max(_STRIP // header.width // factor, 1) * factor
  for start in range(0, rows, step):
    stop = min(start + step, rows)
    strip = image.crop((left, top + start, left + columns, top + stop))
    strip = _scaled(strip, extrema) if extrema else strip
    strip = _as_rgb(strip, background)
    found = np.asarray(strip.reduce(factor) if factor > 1 else strip)
    lying[start // factor : start // factor + len(found)] = found
  return pixels


def _factor(header: _Header, square: bool) -> int:
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


def _box(header: _Header) -> tuple[int, int, int, int]:
  """(top, left, height, width) of the upright image's central square, in the image as stored."""
  edge = min(header.upright)
  *mirrored, swapped = _TURNS[header.orientation]
  rest = [length - edge for length in header.upright]
  corner = [r - r // 2 if m else r // 2 for r, m in zip(rest, mirrored, strict=True)]
  return *(corner[::-1] if swapped else corner), edge, edge


def _as_it_lies(upright: np.ndarray, orientation: int) -> np.ndarray:
  """A view of an upright array [h w ...] with the axes of the stored image."""
  rows, columns, swapped = _TURNS[orientation]
  view = upright[:: -1 if rows else 1, :: -1 if columns else 1]
  return view.swapaxes(0, 1) if swapped else view


_WITHOUT_RANGE = ('I', 'F')
"""Modes whose values have no range of their own."""
_RANGES = (255.0, 65535.0, 2.0**32 - 1)
_OPAQUE = ('1', 'L', 'RGB', 'CMYK', 'YCbCr')


def _as_rgb(image: Image.Image, background: str) -> Image.Image:
  """An image as sRGB over a background of that name; of 16 bits, 65535 becomes 255."""
  if image.mode.startswith('I;16'):
    return _from_sixteen(image, background)
  image = to_srgb(image)
  if image.mode == 'LAB':
    return ImageCms.applyTransform(image, _from_lab())
  if image.mode in _OPAQUE and 'transparency' not in image.info:
    return image if image.mode == 'RGB' else image.convert('RGB')
  image = image.convert('RGBA')
  return Image.alpha_composite(Image.new('RGBA', image.size, background), image).convert('RGB')


def _scaled(image: Image.Image, extrema: tuple[float, float]) -> Image.Image:
  """32-bit numbers as 8 bits of gray; extrema: of the whole image, of which this is a strip.

  Scaled from the first of the usual ranges that holds all ([0, 1] for floats, then 8, 16, 32 bits);
  if some are below 0, from the lowest to the highest.
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
  gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert('RGB')
  clear = image.info.get('transparency')
  if not isinstance(clear, int):
    return gray
  opaque = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
  return Image.composite(gray, Image.new('RGB', image.size, background), opaque)


@functools.cache
def _from_lab() -> ImageCms.ImageCmsTransform:
  lab, rgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
  return ImageCms.buildTransform(lab, rgb, 'LAB', 'RGB')
