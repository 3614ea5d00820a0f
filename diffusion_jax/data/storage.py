"""Files by path or by URL: found, and read in parts; remote ones through fsspec.

A local path is opened as it is. gs://, s3://, http:// and others need fsspec and, for each kind of
storage, the package that it asks for (gcsfs, s3fs, aiohttp), which find endpoint and credentials in
the environment. What fails for a moment is tried again, for at most PATIENCE seconds.
"""

import glob
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffusion_jax.data.finding import Left, find_files
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, first_line, reading

MOST_FILES = 100_000
PATIENCE = 10.0
_PAUSES = (0.2, 1.0)
"""Seconds between tries."""
_AHEAD = 2**20
"""Bytes that are read at once of a remote file that is read in order."""
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
    places = [each for one in _expanded(pattern) for each in _found(one, tuple(suffixes))]
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


def _found(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
  if not is_remote(pattern):
    if _MAGIC.search(pattern) and not os.path.lexists(pattern):
      return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if os.path.isdir(pattern):
      return [path.as_posix() for path in find_files(pattern, Left())]
    return [pattern] if os.path.isfile(pattern) else []
  system, path = file_system(pattern)

  def listed() -> list[str]:
    magic = bool(_MAGIC.search(path))
    try:
      # To list a folder first, for what searches it passes errors over; but never a file: over HTTP
      # that is to fetch it.
      if magic or not path.lower().endswith(suffixes):
        system.ls(file_system(root_of(pattern))[1] if magic else path)
        return system.glob(path) if magic else system.find(path)
      system.info(path)
      return [path]
    except FileNotFoundError as error:
      if _may_be_there(error):
        raise
      return []

  return [system.unstrip_protocol(name) for name in _patiently(listed)]


def _file(path: str) -> File:
  if not is_remote(path):
    found = os.stat(path)
    return File(os.path.abspath(path), found.st_size, str(found.st_mtime_ns))
  system, name = file_system(path)
  info = _patiently(lambda: system.info(name))
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


class NotRead(OSError):
  """A remote file cannot be read, though it was tried more than once."""


def _patiently(get: Callable[[], Any]) -> Any:
  """What `get` returns, called again after errors that may pass. NotRead, OSError, UserError."""
  began = time.monotonic()
  for pause in (*_PAUSES, None):
    try:
      return get()
    except (PermissionError, UserError):
      raise
    except Exception as error:  # Whatever storage raises.
      if isinstance(error, FileNotFoundError) and not _may_be_there(error):
        raise
      if pause is None or time.monotonic() - began > PATIENCE:
        # What fsspec says of all that is not there over HTTP is no more than the URL.
        reason = error.__cause__ if isinstance(error, FileNotFoundError) else error
        raise NotRead(first_line(reason)) from error
      time.sleep(pause)


def cause_of(error: BaseException) -> str:
  """The cause of a record that is bad because of an error, see `errors.Unreadable`."""
  away = (NotRead, FileNotFoundError)
  known = isinstance(error, away) or isinstance(error.__cause__, away)
  return 'not readable' if known else 'damaged'


def _may_be_there(error: FileNotFoundError) -> bool:
  """Whether it is of another answer than 404, or of none: fsspec says so of all over HTTP."""
  cause = error.__cause__
  return cause is not None and getattr(cause, 'status', 0) != 404


def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
  """Bytes of a file, to its end or so many; of a local one fewer where it ends. OSError."""
  if not is_remote(path):
    with open(path, 'rb', buffering=0) as file:
      file.seek(offset)
      return _all(file, size)
  system, name = file_system(path)

  def part() -> bytes:
    # By name, for s3fs has another argument first.
    data = system.cat_file(name, start=offset, end=None if size is None else offset + size)
    if size is not None and len(data) != size:  # Such as of a server that ignores ranges.
      raise ValueError(f'{len(data):,} bytes came where {size:,} were asked for')
    return data

  return b'' if size == 0 else _patiently(part)


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
  size = _patiently(lambda: system.info(name)).get('size')
  if size is None:
    raise NotRead('the server does not say how many bytes it has')
  return io.BufferedReader(_Remote(path, size), _AHEAD)


class _Remote(io.RawIOBase):
  """A remote file of a known size, of which each part is read by itself."""

  def __init__(self, path: str, size: int):
    super().__init__()
    self._path, self._size, self._place = path, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}
    self._place = starts[whence] + offset
    return self._place

  def tell(self) -> int:
    return self._place

  def readinto(self, buffer: Any) -> int:
    count = max(min(len(buffer), self._size - self._place), 0)
    buffer[:count] = read(self._path, self._place, count)
    self._place += count
    return count
