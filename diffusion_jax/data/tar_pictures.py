"""Pictures in tar files, such as the shards of webdataset, read in place."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.data.finding import SUFFIXES, Left
from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, reading, shown

MAX_BYTES = 2**28
"""Of a member, which is read whole."""
MOST_HEADER_BYTES = 2**20
"""Of all headers before one member: names of any length, but none that fills the memory."""


class Member(NamedTuple):
  """A picture in an archive by the place of its bytes; `damage` says why it cannot be read."""

  archive: Path
  name: str
  offset: int = 0
  size: int = 0
  damage: str = ''


class TarPictures(Sequence):
  """All pictures of uncompressed tar files, archive after archive, in the order in them.

  Headers are read once; pixels are read by offset when they are asked for. Nothing is written and
  names are only names, so it does not matter where they point. An archive that is cut or damaged
  has, after its last member that is known, one more that cannot be read.

  Attributes:
    notes: what was left out, for people.

  Raises:
    UserError: no tar file at a path, or no picture in any of them.
  """

  def __init__(self, archives: Sequence[Path]):
    left = Left()
    self.members = [member for archive in archives for member in _members(archive, left)]
    self.notes = left.notes(archives[0] if len(archives) == 1 else archives[0].parent)
    if not self.members:
      raise UserError(
        f'there is no picture ({", ".join(SUFFIXES)}) in {archives[0]}'
        + (f' and {len(archives) - 1} more tar files.' if len(archives) > 1 else '.')
      )

  def __len__(self) -> int:
    return len(self.members)

  def __getitem__(self, index: int) -> np.ndarray:
    """Picture `index`, uint8 [h w 3]. UserError, naming it, where it cannot be read."""
    member = self.members[index]
    where = f'{member.name} in {member.archive}'
    if member.damage:
      raise UserError(f'the image {where} cannot be read ({member.damage}); fetch the file again.')
    if member.size > MAX_BYTES:
      raise UserError(f'the image {where} has {member.size:,} bytes; give one of {MAX_BYTES:,}.')
    with reading(f'the image {where}', remedy='fetch the file again'):
      with member.archive.open('rb') as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
      raise UserError(f'the image {where} is cut, and what came behind it; fetch the file again.')
    return read_pixels(io.BytesIO(data), where)


class _Headers:
  """A file of which no more is read at a time than the headers before one member may take."""

  def __init__(self, file: BinaryIO):
    self._file, self.left = file, MOST_HEADER_BYTES

  def read(self, size: int) -> bytes:
    if not 0 <= size <= self.left:
      raise ValueError(f'a header of more than {MOST_HEADER_BYTES:,} bytes')
    self.left -= size
    return self._file.read(size)

  def seek(self, offset: int) -> int:
    return self._file.seek(offset)

  def tell(self) -> int:
    return self._file.tell()


def _members(archive: Path, left: Left) -> Iterator[Member]:
  """The pictures of one archive. UserError where it is none."""
  with reading(archive, 'is not an uncompressed tar file', 'fetch or pack it again'):
    if not archive.is_file():  # A pipe would wait for a writer for ever.
      raise OSError('it is not a regular file')
    with archive.open('rb') as file:
      headers = _Headers(file)
      with tarfile.open(fileobj=headers, mode='r:') as tar:
        yield from _pictures(tar, headers, archive, left)


def _pictures(
  tar: tarfile.TarFile, headers: _Headers, archive: Path, left: Left
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
    before, last = info.offset, shown(info.name)
    name = PurePosixPath(info.name).name
    if not name.lower().endswith(SUFFIXES) or name.startswith('.') or info.isdir():
      continue
    if info.isfile():
      sparse = 'it is stored sparsely' if info.issparse() else ''
      yield Member(archive, last, info.offset_data, info.size, sparse)
    else:
      link = info.issym() or info.islnk()
      left.add('links in tar files' if link else 'what is no regular file in tar files', last)
  # Python's reader takes a damaged header for the end, which is marked by blocks of zeros.
  if damage or not _ends(archive, tar.offset):
    damage = damage or 'the mark of its end is missing'
    yield Member(archive, f'what follows {last}', damage=damage)


def _ends(archive: Path, offset: int) -> bool:
  with archive.open('rb') as file:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
