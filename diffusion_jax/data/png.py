"""PNG files without what their pixels do not need, and large ones by strips of rows.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

SIGNATURE = b'\x89PNG\r\n\x1a\n'
_PIXELS = (b'IHDR', b'PLTE', b'tRNS')
_TEXTS = (b'tEXt', b'zTXt', b'iTXt')
_TURNING = (b'Raw profile type exif\0', b'XML:com.adobe.xmp\0')
"""Texts that may say how a picture is turned; eXIf is younger."""
_SMALL = 2**16
"""Bytes of a chunk that is kept: a palette has 768."""
_UNPACKED = 2**20
"""Bytes of a text once it is unpacked; Pillow refuses pictures with more."""


class Chunk(NamedTuple):
  """offset, length: of its data, in bytes."""

  kind: bytes
  offset: int
  length: int


def without_extras(file: BinaryIO) -> 'Joined':
  """Return the file with only those chunks that decide its pixels and how they are turned.

  Texts and profiles, of whatever size, and frames after the first are passed over unread. What is
  left comes before the pixels, so that how these are turned is known before they are decoded.
  """
  head, data = [SIGNATURE], []
  for chunk in _chunks(file):
    if chunk.kind == b'IDAT':
      data.append(chunk)
    elif chunk.length <= _SMALL and (chunk.kind in _PIXELS or _turns(file, chunk)):
      file.seek(chunk.offset - 8)
      head.append(file.read(chunk.length + 12))
  return Joined(file, b''.join(head), data)


def made(kind: bytes, data: bytes) -> bytes:
  """Return a chunk with its length and checksum."""
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def _chunks(file: BinaryIO) -> Iterator[Chunk]:
  offset = len(SIGNATURE)
  while True:
    file.seek(offset)
    header = file.read(8)
    if len(header) < 8 or header[4:] == b'IEND':
      return
    length, kind = struct.unpack('>I4s', header)
    yield Chunk(kind, offset + 8, length)
    offset += length + 12


def _turns(file: BinaryIO, chunk: Chunk) -> bool:
  """Return whether a chunk is whole and may say how the picture is turned."""
  if chunk.kind != b'eXIf' and chunk.kind not in _TEXTS:
    return False
  file.seek(chunk.offset)
  data, checksum = file.read(chunk.length), file.read(4)
  if checksum != struct.pack('>I', zlib.crc32(chunk.kind + data)):
    return False
  if chunk.kind == b'eXIf':
    return True
  return data.startswith(_TURNING) and (chunk.kind != b'zTXt' or _is_small(data))


def _is_small(data: bytes) -> bool:
  try:
    packed = data[data.index(b'\0') + 2 :]
    return len(zlib.decompressobj().decompress(packed, _UNPACKED + 1)) <= _UNPACKED
  except zlib.error:
    return False


class Joined(io.RawIOBase):
  """A head, and then the chunks `data` of a file, to be read as one file."""

  def __init__(self, file: BinaryIO, head: bytes, data: list[Chunk]):
    super().__init__()
    self.file, self.head, self.data = file, head, data
    self._tail, self._at = made(b'IEND', b''), 0
    lengths = [len(head), *(chunk.length + 12 for chunk in data), len(self._tail)]
    self._ends = np.cumsum(lengths).tolist()

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._at = offset + (0, self._at, self._ends[-1])[whence]
    return self._at

  def readinto(self, buffer) -> int:
    part = int(np.searchsorted(self._ends, self._at, side='right'))
    if part == len(self._ends):
      return 0
    start = self._ends[part - 1] if part else 0
    within, size = self._at - start, min(len(buffer), self._ends[part] - self._at)
    if 0 < part <= len(self.data):
      self.file.seek(self.data[part - 1].offset - 8 + within)
      found = self.file.read(size)
    else:
      found = (self._tail if part else self.head)[within : within + size]
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)


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
    """Yield strips of so many rows, from the top, in the mode that Pillow gives the picture.

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
    """Yield the rows of each strip, uint8 [n r + 1], each after the number of its filter."""
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
