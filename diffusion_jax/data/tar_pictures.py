"""Pictures in tar files, such as the shards of webdataset, read in place."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from diffusion_jax.data.finding import SUFFIXES
from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError

MAX_BYTES = 2**28
"""Of a member, which is read whole."""


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

  Raises:
    UserError: no tar file at a path, or no picture in any of them.
  """

  def __init__(self, archives: Sequence[Path]):
    self.members = [member for archive in archives for member in _members(archive)]
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
    try:
      with member.archive.open('rb') as file:
        file.seek(member.offset)
        data = file.read(member.size)
    except OSError as error:
      raise UserError(f'the image {where} cannot be read ({error}).') from error
    if len(data) < member.size:
      raise UserError(f'the image {where} is cut, and what came behind it; fetch the file again.')
    return read_pixels(io.BytesIO(data), where)


def _members(archive: Path) -> Iterator[Member]:
  """The pictures of one archive. UserError where it is none."""
  try:
    if not archive.is_file():  # A pipe would wait for a writer for ever.
      raise OSError('it is not a regular file')
    with tarfile.open(archive, 'r:') as tar:
      yield from _pictures(tar, archive)
  except (tarfile.TarError, OSError, ValueError, EOFError) as error:
    raise UserError(f'{archive} is not an uncompressed tar file ({error}).') from error


def _pictures(tar: tarfile.TarFile, archive: Path) -> Iterator[Member]:
  last, damage = 'the start', ''
  while True:
    try:
      info = tar.next()
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
      info, damage = None, str(error)
    if info is None:
      break
    tar.members.clear()  # It would keep the headers of all.
    last = info.name
    name = PurePosixPath(info.name).name
    if info.isfile() and name.lower().endswith(SUFFIXES) and not name.startswith('.'):
      sparse = 'it is stored sparsely' if info.issparse() else ''
      yield Member(archive, info.name, info.offset_data, info.size, sparse)
  # Python's reader takes a damaged header for the end, which is marked by blocks of zeros.
  if damage or not _ends(archive, tar.offset):
    damage = damage or 'the mark of its end is missing'
    yield Member(archive, f'what follows {last}', damage=damage)


def _ends(archive: Path, offset: int) -> bool:
  with archive.open('rb') as file:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
