"""Files by path or by URL: found, and read in parts; remote ones through fsspec.

A local path is opened as it is. gs://, s3://, http:// and others need fsspec and, for each kind of
storage, the package that it asks for (gcsfs, s3fs).
"""

import glob
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffusion_jax.data.finding import Left, find_files
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, first_line, reading

MOST_FILES = 100_000
_STAMPS = ('ETag', 'etag', 'md5Hash', 'mtime', 'LastModified', 'created')
"""What storage calls that which changes with the content of a file."""
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
_MAGIC = re.compile(r'[*?\[]')


class File(NamedTuple):
  """A path or URL, its size in bytes, and what changes when its content does."""

  path: str
  size: int
  stamp: str

  @property
  def name(self) -> str:
    """The last part of the path."""
    return self.path.rpartition('/')[2]


def root_of(pattern: str) -> str:
  """The folder that all files of a pattern are in, absolute."""
  fixed = pattern[: match.start()] if (match := re.search(r'[*?\[{]', pattern)) else pattern
  if match or not (is_remote(fixed) or os.path.isdir(fixed)):
    fixed = fixed.rpartition('/')[0]
  if not is_remote(fixed):
    return os.path.abspath(fixed)
  system, path = file_system(fixed)
  return system.unstrip_protocol(path)


def is_remote(path: str) -> bool:
  """True for URLs."""
  return '://' in path


def find(pattern: str, suffixes: Sequence[str], what: str) -> list[File]:
  """Files with one of the suffixes, sorted: PATH, a folder, or a pattern with *, ? or {000..123}.

  UserError: there is none, or they cannot be listed; `what` they should be, in errors.
  """
  try:
    places = [each for one in _expanded(pattern) for each in _found(one)]
    files = {place for place in places if place.lower().endswith(tuple(suffixes))}
    found = [_file(path) for path in sorted(files, key=lambda path: path.split('/'))]
  except UserError:
    raise
  except Exception as error:  # Whatever storage raises.
    raise UserError(f'{pattern} cannot be listed ({first_line(error)}); check the path.') from error
  if not found:
    raise UserError(f'there is no {what} ({", ".join(suffixes)}) at {pattern}; check the path.')
  if len(found) > MOST_FILES:
    raise UserError(f'{pattern} names {len(found):,} files; give at most {MOST_FILES:,}.')
  return found


def _expanded(pattern: str) -> list[str]:
  """{000..123}, as WebDataset writes it, as so many names."""
  match = _RANGE.search(pattern)
  if not match:
    return [pattern]
  first, last = map(int, match.groups())
  if not 0 <= last - first < MOST_FILES:
    raise UserError(f'{pattern} names {last - first + 1:,} files; give 1 to {MOST_FILES:,}.')
  names = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
  return [each for name in names for each in
          _expanded(pattern[: match.start()] + name + pattern[match.end() :])]


def _found(pattern: str) -> list[str]:
  if not is_remote(pattern):
    if _MAGIC.search(pattern) and not os.path.lexists(pattern):
      return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if os.path.isdir(pattern):
      return [path.as_posix() for path in find_files(pattern, Left())]
    return [pattern] if os.path.isfile(pattern) else []
  system, path = file_system(pattern)
  if _MAGIC.search(path):
    names = system.glob(path)
  elif system.isdir(path):
    names = system.find(path)
  else:
    names = [path] if system.exists(path) else []
  return [system.unstrip_protocol(name) for name in names]


def _file(path: str) -> File:
  if not is_remote(path):
    found = os.stat(path)
    return File(os.path.abspath(path), found.st_size, str(found.st_mtime_ns))
  system, name = file_system(path)
  info = system.info(name)
  stamps = [str(info[key]) for key in _STAMPS if info.get(key)]
  return File(path, int(info.get('size') or 0), ' '.join(stamps))


def file_system(url: str) -> tuple[Any, str]:
  """(fsspec's file system, path in it) of a URL. UserError: a package is missing."""
  try:
    import fsspec

    return fsspec.core.url_to_fs(url)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"{url} cannot be opened ({first_line(error)}); install what it needs, such as pip install "
      "'diffusion_jax[data]' and gcsfs or s3fs."
    ) from error


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
  """Bytes of a file, to its end or so many, fewer where it ends. OSError."""
  if not is_remote(path):
    with open(path, 'rb', buffering=0) as file:
      file.seek(offset)
      return _all(file, size)
  system, name = file_system(path)
  return system.cat_file(name, offset, None if size is None else offset + size)


def copied(url: str, folder: Path) -> Path:
  """A local copy of a file in a folder, made unless it is there. UserError: it cannot be."""
  place = folder / url.rpartition('/')[2]
  if not place.is_file():
    with reading(url, 'cannot be copied here', 'check the path and the disk'):
      with opened(url) as source, atomic_write(place) as file:
        shutil.copyfileobj(source, file, 2**22)
  return place


def _all(file: BinaryIO, size: int | None) -> bytes:
  if size is None:
    return file.read()
  data = file.read(size)
  while 0 < len(data) < size and (more := file.read(size - len(data))):
    data += more
  return data


def opened(path: str) -> BinaryIO:
  """Open a file for reading from any place. OSError."""
  if not is_remote(path):
    if not Path(path).is_file():  # A pipe would wait for a writer for ever.
      raise OSError('it is not a regular file')
    return open(path, 'rb')
  system, name = file_system(path)
  return system.open(name, 'rb')
