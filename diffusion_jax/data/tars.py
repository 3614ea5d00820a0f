"""Members of uncompressed tar files by the place of their bytes: nothing is unpacked or written.

Names may therefore say anything; links, and what is no regular file, are left out.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from diffusion_jax.data import storage
from diffusion_jax.data.finding import Left
from diffusion_jax.files import first_line, printable, reading

MOST_HEADER_BYTES = 2**20
"""Most bytes of the headers before one member: names may be long, but not fill the memory."""
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
      headers = _Headers(file)
      with tarfile.open(fileobj=headers, mode='r:') as tar:
        yield from _members(tar, headers, archive, left, tuple(suffixes))


class _Headers:
  """A file of which no more is read at a time than the headers before one member may take."""

  def __init__(self, file: BinaryIO):
    self.file, self.left = file, MOST_HEADER_BYTES

  def read(self, size: int) -> bytes:
    if not 0 <= size <= self.left:
      raise ValueError(f'a header of more than {MOST_HEADER_BYTES:,} bytes')
    self.left -= size
    return self.file.read(size)

  def seek(self, offset: int) -> int:
    return self.file.seek(offset)

  def tell(self) -> int:
    return self.file.tell()


def _members(
  tar: tarfile.TarFile, headers: _Headers, archive: str, left: Left, suffixes: tuple[str, ...]
) -> Iterator[Member]:
  last, damage, before = 'the start', '', -1
  while True:
    headers.left = MOST_HEADER_BYTES
    try:
      info = tar.next()
      # A size below 0 would lead back, and round and round.
      if info is not None and not before < info.offset < tar.offset:
        raise ValueError('a header points back')
    except Exception as error:  # Its parser lets through whatever it comes upon.
      info, damage = None, first_line(error)
    if info is None:
      break
    tar.members.clear()  # It would keep the headers of all.
    before, last = info.offset, printable(info.name)
    name = PurePosixPath(info.name).name
    if not name.lower().endswith(suffixes) or name.startswith('.') or info.isdir():
      continue
    if info.isfile():
      sparse = 'it is stored sparsely' if info.issparse() else ''
      yield Member(archive, last, info.offset_data, info.size, sparse)
    else:
      link = info.issym() or info.islnk()
      left.add('links in tar files' if link else 'what is no regular file in tar files', last)
  # Python's reader takes a damaged header for the end, which is marked by blocks of zeros.
  if damage or not _ends(headers.file, tar.offset):
    damage = damage or 'the mark of its end is missing'
    yield Member(archive, f'what follows {last}', damage=damage)


def _ends(file: BinaryIO, offset: int) -> bool:
  file.seek(offset)
  return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
