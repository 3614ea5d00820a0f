"""Members of uncompressed tar files by the place of their bytes: nothing is unpacked or written.

Names may therefore say anything; links, and what is no regular file, are left out.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from diffusion_jax.data import storage
from diffusion_jax.data.finding import Left
from diffusion_jax.data.tar_headers import BLOCK, regular_file
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, printable, reading

MOST_HEADER_BYTES = 2**20
"""Most bytes of the headers before one member: names may be long, but not fill the memory."""
_CHUNK = 2**13
TAIL = -1
"""The offset of the member that stands for what cannot be read at the end of a damaged file."""


class Member(NamedTuple):
  """A file in an archive by the place of its bytes; `damage` says why it cannot be read."""

  archive: str
  name: str
  offset: int = TAIL
  size: int = 0
  damage: str = ''


def members(archive: str, left: Left, suffixes: Sequence[str]) -> Iterator[Member]:
  """The regular files of one archive whose names end so, and are not hidden, as they lie.

  An archive that is cut or damaged ends with one more, at TAIL. UserError: no tar file. left:
  records links and what is no regular file.
  """
  with reading(archive, 'is not an uncompressed tar file', 'fetch or pack it again'):
    with storage.opened(archive) as file:
      headers = _Headers(file, archive)
      with tarfile.open(fileobj=headers, mode='r:') as tar:
        yield from _members(tar, headers, archive, left, tuple(suffixes))


class _Headers:
  """A file of which no more is read at a time than the headers before one member may take.

  UserError, naming the archive, where it cannot be read: it is not damaged then, nor at its end.
  """

  def __init__(self, file: BinaryIO, archive: str):
    self.file, self.archive, self.left = file, archive, MOST_HEADER_BYTES
    self._chunk, self._start = b'', 0

  def read(self, size: int) -> bytes:
    if not 0 <= size <= self.left:
      raise ValueError(f'a header of more than {MOST_HEADER_BYTES:,} bytes')
    self.left -= size
    with reading(self.archive, remedy='fetch it again'):
      return self.file.read(size)

  def seek(self, offset: int) -> int:
    return self.file.seek(offset)

  def tell(self) -> int:
    return self.file.tell()

  def at(self, offset: int, size: int) -> bytes:
    """So many bytes from an offset, fewer at the end of the file."""
    start = offset - self._start
    if start < 0 or start + size > len(self._chunk):
      try:
        self.file.seek(offset)
      except (OverflowError, ValueError):  # No file is that long.
        return b''
      with reading(self.archive, remedy='fetch it again'):
        self._chunk, self._start, start = self.file.read(max(size, _CHUNK)), offset, 0
    return self._chunk[start : start + size]


def _members(
  tar: tarfile.TarFile, headers: _Headers, archive: str, left: Left, suffixes: tuple[str, ...]
) -> Iterator[Member]:
  last, damage, place = 'the start', '', 0
  while True:
    # tarfile has read the first, and knows what a global header says of all that follow.
    found = regular_file(headers.at, place, tar.encoding, tar.errors) if (
      place and not tar.pax_headers
    ) else None
    if found:
      tar.offset = place = found.next
      last = printable(found.name)
      if _is_wanted(found.name, suffixes):
        yield Member(archive, last, found.offset, found.size)
      continue
    headers.left = MOST_HEADER_BYTES
    headers.seek(0)  # From elsewhere it makes sure that the file goes on to where it seeks.
    try:
      info = tar.next()
      # A size below 0 would lead back, and round and round.
      if info is not None and not place <= info.offset < tar.offset:
        raise ValueError('a header points back')
    except UserError:
      raise
    except Exception as error:  # Its parser lets through whatever it comes upon.
      info, damage = None, first_line(error)
    if info is None:
      break
    tar.members.clear()  # It would keep the headers of all.
    place, last = tar.offset, printable(info.name)
    if info.isdir() or not _is_wanted(info.name, suffixes):
      continue
    if info.isfile():
      sparse = 'it is stored sparsely' if info.issparse() else ''
      yield Member(archive, last, info.offset_data, info.size, sparse)
    else:
      link = info.issym() or info.islnk()
      left.add('links in tar files' if link else 'what is no regular file in tar files', last)
  # Python's reader takes a damaged header for the end, which is marked by blocks of zeros.
  if damage or headers.at(tar.offset, BLOCK) != bytes(BLOCK):
    damage = damage or 'the mark of its end is missing'
    yield Member(archive, f'what follows {last}', damage=damage)


def _is_wanted(name: str, suffixes: tuple[str, ...]) -> bool:
  """Whether the last part of a path ends so, and is not hidden."""
  last = name.rpartition('/')[2]
  if last in ('', '.'):  # As of 'a.png/.', which is a.png.
    last = PurePosixPath(name).name
  return last.lower().endswith(suffixes) and not last.startswith('.')
