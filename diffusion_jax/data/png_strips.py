"""Large PNGs by strips of rows, in no more memory than a strip needs."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from diffusion_jax.data.png import SIGNATURE, Joined, made

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Bytes of a pixel -> the type of PNG whose pixels of 8 bits a channel are as wide."""
_HEADER = '>IIBBBBB'
_PART = 2**18


class PngStrips:
  """A PNG by strips, each decoded by Pillow as a PNG of its own.

  fits: whether it can be read so. Those that are interlaced begin with pixels from everywhere, and
  of pixels of 6 and 8 bytes Pillow does not give back the bytes, which the next row's filter needs.
  """

  def __init__(self, file: Joined):
    self._file, start = file, len(SIGNATURE) + 8
    self._header = file.head[start : start + struct.calcsize(_HEADER)]
    self._extras = file.head[start + len(self._header) + 4 :]
    self.width, self.height, depth, kind, *_, interlaced = struct.unpack(_HEADER, self._header)
    bits = depth * _CHANNELS[kind]
    self._row, self._pixel = -(-self.width * bits // 8), max(bits // 8, 1)
    self._plain = depth == 8 and kind == _TYPES.get(self._pixel)
    self.fits = not interlaced and self._pixel in _TYPES

  def __call__(self, rows: int, first: int = 0) -> Iterator[Image.Image]:
    """Strips of so many rows, from the top, in the mode that Pillow gives the picture.

    Where `first` is not 0, the first strip has so many rows.

    Raises:
      OSError: the file is cut. zlib.error: it is damaged.
    """
    above = np.zeros((1, self._row), np.uint8)
    for filtered in self._filtered(rows, first or rows):
      image = self._unfiltered(above, filtered)
      raw = np.asarray(image).reshape(len(filtered) + 1, self._row)[1:]
      above = raw[-1:].copy()
      if self._plain:
        yield image.crop((0, 1, self.width, len(raw) + 1))
      else:
        yield _picture(self._header, self._extras, np.pad(raw, ((0, 0), (1, 0))))

  def _filtered(self, rows: int, first: int) -> Iterator[np.ndarray]:
    """Of each strip the rows, uint8 [n r + 1], each with the number of its filter before it."""
    length, left = self._row + 1, self.height
    unpack, parts, waiting = zlib.decompressobj(), self._packed(), b''
    while left:
      count = min(rows if left < self.height else first, left)
      found = bytearray()
      while len(found) < count * length:
        waiting = waiting or next(parts, b'')
        more = unpack.decompress(waiting, count * length - len(found))
        if not more and not waiting:
          raise OSError('image file is truncated')
        waiting = unpack.unconsumed_tail
        found += more
      yield np.frombuffer(found, np.uint8).reshape(count, length)
      left -= count

  def _packed(self) -> Iterator[bytes]:
    for chunk in self._file.data:
      for start in range(0, chunk.length, _PART):
        self._file.file.seek(chunk.offset + start)
        yield self._file.file.read(min(_PART, chunk.length - start))

  def _unfiltered(self, above: np.ndarray, filtered: np.ndarray) -> Image.Image:
    """The bytes of the rows after those of the row above them, [1 r], as pixels of 8 bits.

    For filters know of bytes, and of the width of a pixel, alone.
    """
    rows = np.concatenate([np.pad(above, ((0, 0), (1, 0))), filtered])
    header = struct.pack(_HEADER, self._row // self._pixel, 0, 8, _TYPES[self._pixel], 0, 0, 0)
    return _picture(header, self._extras if self._plain else b'', rows)


def _picture(header: bytes, extras: bytes, rows: np.ndarray) -> Image.Image:
  """A PNG with this header, but of the height of these filtered rows, decoded."""
  header = header[:4] + struct.pack('>I', len(rows)) + header[8:]
  data = b''.join([
    SIGNATURE, made(b'IHDR', header), extras, made(b'IDAT', zlib.compress(rows, 0)),
    made(b'IEND', b''),
  ])
  image = PngImagePlugin.PngImageFile(io.BytesIO(data))
  image.load()
  return image
