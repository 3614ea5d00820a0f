"""Shards of a cache as ArrayRecord files, whose names say what they follow from and hold.

ID-DIGEST.array_record: ID is a hash of what all rows follow from and of the shard's records, DIGEST
one of the file's bytes. A file that is there is whole: it is written under another name, synced and
renamed. ID-DIGEST-3.array_record has three rows without anything, of records that cannot be read.
"""

import collections
import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.data.cache.rows import Shard
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line

SUFFIX = '.array_record'
MANIFEST, CHECKED = 'manifest.json', 'checked.json'
"""What the cache is of; and sizes and dates of files whose digests were right."""
NAME = re.compile(r'([0-9a-f]{32})-([0-9a-f]{32})(?:-([1-9][0-9]{0,9}))?\.array_record')
_TEMPORARY = re.compile(r'\.[0-9a-f]{32}\.[0-9a-f]{8}\.tmp')
_WRITTEN, _READ = 'group_size:1,uncompressed', 'readahead_buffer_size:0,max_parallelism:0'
_LIMIT = 16_384
"""Open files that a process asks the system for, if it may have fewer."""


def write_shard(folder: Path, name: str, records: Sequence[bytes], unreadable: int) -> str:
  """Write the shard whose ID is `name` and return its file's name. UserError without room."""
  from array_record.python.array_record_module import ArrayRecordWriter

  temporary = folder / f'.{name}.{secrets.token_hex(4)}.tmp'
  try:
    writer = ArrayRecordWriter(str(temporary), _WRITTEN)
    for record in records:
      writer.write(record)
    writer.close()
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
      digest = digest_of(file)
    found = f'{name}-{digest}{f"-{unreadable}" if unreadable else ""}{SUFFIX}'
    os.replace(temporary, folder / found)
    return found
  except (OSError, RuntimeError) as error:
    raise UserError(
      f'the cache in {folder} cannot be written ({first_line(error)}); make room, or give another '
      'settings.cache_dir, and start again: what is there is kept.'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def digest_of(file: Any) -> str:
  """A hash of what is in an open file."""
  return hashlib.file_digest(file, 'sha256').hexdigest()[:32]


def is_whole(path: Path) -> bool:
  """Return whether a file has the bytes that its name says."""
  try:
    with path.open('rb') as file:
      return digest_of(file) == NAME.fullmatch(path.name)[2]
  except OSError:
    return False


def shards_in(folder: Path) -> dict[str, list[str]]:
  """Return the names of files by ID, sorted."""
  found: dict[str, list[str]] = {}
  for name in sorted(os.listdir(folder)):
    if match := NAME.fullmatch(name):
      found.setdefault(match[1], []).append(name)
  return found


def temporaries_in(folder: Path) -> Iterator[Path]:
  """Yield what killed processes have left."""
  return (folder / name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name))


def open_shard(path: Path) -> Shard:
  """Open a file. UserError where it is gone or damaged, also when an entry is read later."""
  from array_record.python.array_record_module import ArrayRecordReader

  def damaged(why: str) -> UserError:
    with contextlib.suppress(OSError):  # So that the next start looks at all that is in it.
      (path.parent / CHECKED).unlink(missing_ok=True)
    return UserError(
      f'the file of a cache {path} is damaged ({why}); start again: what is in it is encoded anew.'
    )

  try:
    reader = ArrayRecordReader(str(path), _READ)
    count = reader.num_records() if reader.ok() else 0
  except Exception as error:
    raise damaged(first_line(error)) from error

  def get(number: int) -> bytes:
    try:
      return reader.read([number])[0]
    except Exception as error:
      raise damaged(first_line(error)) from error

  try:
    return Shard(get, count, damaged)
  except UserError:
    raise
  except Exception as error:
    raise damaged(first_line(error)) from error


def most_open() -> int:
  """Return how many files may stay open: a quarter of what the system lets a process have, _LIMIT
  at most, since there are latents, texts and others. Its limit is raised to that if it may be."""
  try:
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _LIMIT if most == resource.RLIM_INFINITY else min(most, _LIMIT)
    if 0 <= limit < wanted:
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
      limit = wanted
    return (min(limit, _LIMIT) if limit >= 0 else _LIMIT) // 4
  except (ImportError, OSError, ValueError):  # Another system than Unix, or one that forbids it.
    return 128


class OpenShards:
  """Files of a folder by number, the last `most_open` of which stay open; it pickles."""

  def __init__(self, folder: Path, names: Sequence[str]):
    self._folder, self._names, self._most = folder, names, most_open()
    self._open: collections.OrderedDict[int, Shard] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self) -> tuple:
    return self._folder, self._names

  def __setstate__(self, state: tuple) -> None:
    self.__init__(*state)

  def __call__(self, number: int) -> Shard:
    with self._lock:
      if (shard := self._open.get(number)) is not None:
        self._open.move_to_end(number)
        return shard
    shard = open_shard(self._folder / self._names[number])
    with self._lock:
      self._open[number] = shard
      if len(self._open) > self._most:
        self._open.popitem(last=False)
    return shard
