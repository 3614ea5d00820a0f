"""Archives of numpy arrays, bounded by what they declare before anything is unpacked."""

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MOST_DIRECTORY = 2**24
"""Bytes of an archive's list of members, each of which takes ten times as much memory."""
MOST_RATIO = 200
"""Of unpacked to packed bytes, from LARGE bytes on: what pictures and features never reach."""
LARGE = 2**26
MOST_TEXT = 2**16
"""Bytes of an array of texts that describes others."""


class Header(NamedTuple):
  """The npy header of a member, of `start` bytes."""

  shape: tuple[int, ...]
  fortran: bool
  dtype: np.dtype
  start: int


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
  """A zip archive whose directory is of a sound size. ValueError, or what zipfile raises."""
  with open(path, 'rb') as file:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
      yield archive


def check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
  """Raise ValueError where a member would unpack to far more than it takes in the archive."""
  if info.file_size > LARGE and info.file_size > MOST_RATIO * info.compress_size:
    raise ValueError(
      f'{info.filename} takes {info.compress_size:,} bytes and claims to unpack to '
      f'{info.file_size:,}'
    )


def read_header(file: BinaryIO, info: zipfile.ZipInfo) -> Header:
  """The header of the array in a member just opened; ValueError: none, objects, or a false size."""
  version = np.lib.format.read_magic(file)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f'{info.filename} has the format {version}, where 1.0 and 2.0 are read')
  shape, fortran, dtype = readers[version](file)
  if dtype.hasobject:
    raise ValueError(f'{info.filename} holds Python objects, which could run code')
  start = file.tell()
  whole = all(type(edge) is int and edge >= 0 for edge in shape)
  if not whole or start + math.prod(shape) * dtype.itemsize != info.file_size:
    raise ValueError(f'{info.filename} has {info.file_size:,} bytes for {dtype} {list(shape)}')
  return Header(shape, fortran, dtype, start)


def read_arrays(path: str | Path, most: Mapping[str, int]) -> dict[str, np.ndarray]:
  """The named arrays that an npz has; most: name -> its largest size in bytes.

  ValueError, or whatever zipfile and numpy raise of damaged bytes: see `files.reading`.
  """
  found = {}
  with opened(path) as archive:
    names = {*archive.namelist()}
    for name, bound in most.items():
      if f'{name}.npy' not in names:
        continue
      info = archive.getinfo(f'{name}.npy')
      check_member(archive, info)
      if info.file_size > bound + MOST_TEXT:
        raise ValueError(f'{name} has {info.file_size:,} bytes, where {bound:,} are allowed')
      with archive.open(info) as file:
        header = read_header(file, info)
        array = np.empty(math.prod(header.shape), header.dtype)
        fill(array, file)
      order: Any = 'F' if header.fortran else 'C'
      found[name] = array.reshape(header.shape, order=order)
  return found


def fill(array: np.ndarray, file: BinaryIO) -> None:
  """Read a contiguous array to a member's end, where its checksum is checked; EOFError if short."""
  into = memoryview(array.reshape(-1).view(np.uint8))
  while read := file.readinto(into):
    into = into[read:]
  if len(into) or file.read(1):
    raise EOFError('it ends too early')


def _check_directory(file: BinaryIO) -> None:
  """Raise ValueError where the archive claims a longer list of members than could be needed."""
  end = file.seek(0, 2)
  file.seek(max(0, end - 2**17))
  tail = file.read()
  file.seek(0)
  at = tail.rfind(b'PK\5\6')
  if at < 0:
    raise ValueError('it is no zip archive')
  size = int.from_bytes(tail[at + 12 : at + 16], 'little')
  large = tail.rfind(b'PK\6\6', 0, at)
  if large >= 0:  # Archives of more than 4 GB say it once more, in eight bytes.
    size = int.from_bytes(tail[large + 40 : large + 48], 'little')
  if size > MOST_DIRECTORY:
    raise ValueError(f'its list of members has {size:,} bytes, where {MOST_DIRECTORY:,} may be')
