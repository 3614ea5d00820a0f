"""PNG files without what is not needed for their pixels."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

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
  """The same file with those chunks alone that decide its pixels and how they are turned.

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
  """A chunk with its length and checksum."""
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
  """Whether a chunk is whole and may say how the picture is turned."""
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
