"""Files of pictures with their headers read: which format, how large, and how they are turned."""

import contextlib
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
  ImageFile,
  JpegImagePlugin,
  PngImagePlugin,
  TiffImagePlugin,
  WebPImagePlugin,
)

from diffusion_jax.data.png import SIGNATURE, Joined, without_extras

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
  """A file for reading, at its start. OSError for what is no regular file, which is not opened."""
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
  """Of the picture in a file. ValueError where it begins like none; else what Pillow raises.

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
  """A view of an upright array [h w ...] whose axes are those of the picture in its file."""
  rows, columns, swapped = _TURNS[orientation]
  view = upright[:: -1 if rows else 1, :: -1 if columns else 1]
  return view.swapaxes(0, 1) if swapped else view


def corner_as_it_lies(
  corner: tuple[int, int], rest: tuple[int, int], orientation: int
) -> tuple[int, int]:
  """Where the upper left corner (row, column) of a part of the upright picture lies in the file.

  rest: by how much the picture is higher and wider than the part.
  """
  *mirrored, swapped = _TURNS[orientation]
  places = [r - c if m else c for c, r, m in zip(corner, rest, mirrored, strict=True)]
  return tuple(places[::-1] if swapped else places)


def is_swapped(orientation: int) -> bool:
  """Whether the upright picture is as high as the one in the file is wide."""
  return _TURNS[orientation][2]


def _kind(file: BinaryIO) -> str:
  file.seek(0)
  start = file.read(16)
  file.seek(0)
  if start[:4] == b'RIFF' and start[8:12] == b'WEBP':
    return 'WEBP'
  return next((kind for kind, starts in _STARTS.items() if start.startswith(starts)), '')
