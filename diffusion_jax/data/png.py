"""PNG files without what their pixels do not need."""

import bisect
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

SIGNATURE = b'\x89PNG\r\n\x1a\n'
_END = b'\0\0\0\0IEND\xaeB`\x82'
_PIXELS = (b'IHDR', b'PLTE', b'tRNS')
_TEXTS = (b'tEXt', b'zTXt', b'iTXt')
_TURNING = (b'Raw profile type exif\0', b'XML:com.adobe.xmp\0')
"""Texts that may say how an image is turned; eXIf is younger."""
_SMALL = 2**16
"""Bytes of a chunk that is kept: a palette has 768."""
_UNPACKED = 2**20
"""Bytes of a text once it is unpacked; Pillow refuses images with more."""


def without_extras(file: BinaryIO) -> io.RawIOBase:
  """The file with only the chunks that decide colours and orientation, orientation before pixels.

  Texts, of whatever size, large profiles, and frames after the first are skipped unread.
  """
  head, pixels = [SIGNATURE], []
  for kind, offset, length in _chunks(file):
    if kind == b'IDAT':
      pixels.append((file, offset - 8, length + 12))
    elif (
      length <= _SMALL and (kind in _PIXELS or _turns(file, kind, offset, length))
    ) or (kind == b'iCCP' and not pixels and _is_profile(file, offset, length)):
      file.seek(offset - 8)
      head.append(file.read(length + 12))
  first = b''.join(head)
  return _Joined([(io.BytesIO(first), 0, len(first)), *pixels, (io.BytesIO(_END), 0, len(_END))])


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
  """(kind, offset and length of its data in bytes) of each chunk."""
  offset = len(SIGNATURE)
  while True:
    file.seek(offset)
    header = file.read(8)
    if len(header) < 8 or header[4:] == b'IEND':
      return
    length, kind = struct.unpack('>I4s', header)
    yield kind, offset + 8, length
    offset += length + 12


def _turns(file: BinaryIO, kind: bytes, offset: int, length: int) -> bool:
  """True if a chunk is intact and may hold the orientation."""
  if kind != b'eXIf' and kind not in _TEXTS:
    return False
  file.seek(offset)
  data, checksum = file.read(length), file.read(4)
  if checksum != struct.pack('>I', zlib.crc32(kind + data)):
    return False
  if kind == b'eXIf':
    return True
  return data.startswith(_TURNING) and (kind != b'zTXt' or _is_small(data))


def _is_profile(file: BinaryIO, offset: int, length: int) -> bool:
  """True if an iCCP chunk is intact and of a size that Pillow reads."""
  if length > _UNPACKED:
    return False
  file.seek(offset)
  data, checksum = file.read(length), file.read(4)
  return checksum == struct.pack('>I', zlib.crc32(b'iCCP' + data)) and _is_small(data)


def _is_small(data: bytes) -> bool:
  try:
    packed = data[data.index(b'\0') + 2 :]
    return len(zlib.decompressobj().decompress(packed, _UNPACKED + 1)) <= _UNPACKED
  except (ValueError, zlib.error):
    return False


class _Joined(io.RawIOBase):
  """Parts of files, (file, start, length) each, to be read as one file."""

  def __init__(self, parts: list[tuple[BinaryIO, int, int]]):
    super().__init__()
    self._parts, self._at = parts, 0
    self._ends = list(itertools.accumulate(length for _, _, length in parts))

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
    number = bisect.bisect_right(self._ends, self._at)
    if number == len(self._parts):
      return 0
    file, start, length = self._parts[number]
    left = self._ends[number] - self._at
    file.seek(start + length - left)
    found = file.read(min(len(buffer), left))
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)
