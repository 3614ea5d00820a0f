"""Hashes of the files of a folder, kept from one start to the next.

A hash counts while path, size, times of change and number (inode) of its file are the same to the
nanosecond; other files are read anew. Files that have just changed are not kept: they might change
again within one tick of the clock.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources.entries import DIGEST
from diffusion_jax.data.sources.index import kept_in
from diffusion_jax.files import atomic_write

_SETTLED = 2 * 10**9
"""Nanoseconds after which a file has not just changed."""
_ROW = np.dtype([('key', '<u8', (2,)), ('hash', 'u1', (DIGEST,))])


class KeptHashes:
  """Digests of files below a folder."""

  def __init__(self, folder: Path, config: DataConfig):
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    self.path = kept_in(config) / f'files-{name}.npy'
    self._rows: np.ndarray | None = None

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_rows': None}

  def __call__(
    self, files: Sequence[Path], numbers: np.ndarray,
    read: Callable[[np.ndarray], np.ndarray],
  ) -> np.ndarray:
    """Digests of some of all files, by number, uint8 [n DIGEST]; read: gives them anew."""
    if self._rows is None:
      self._rows = self._read()
    rows, keys = self._rows, _keys(files, numbers)
    found = np.zeros((len(numbers), DIGEST), np.uint8)
    places = rows['key'][:, 0].searchsorted(keys[:, 0]).clip(max=len(rows) - 1)
    same = (rows['key'][places] == keys).all(axis=1) & keys.any(axis=1)
    found[same] = rows['hash'][places[same]]
    if not same.all():
      found[~same] = read(numbers[~same])
      # What a file was when it was read is known if it is still what it was before.
      kept = keys.any(axis=1) & (_keys(files, numbers) == keys).all(axis=1)
      new = np.zeros(int(kept.sum()) + 1, _ROW)  # One is the key of nothing.
      new['key'][1:], new['hash'][1:] = keys[kept], found[kept]
      rows = new if len(numbers) == len(files) else np.concatenate([new, rows])
      self._write(rows[np.unique(rows['key'][:, 0], return_index=True)[1]])
    return found

  def _write(self, rows: np.ndarray) -> None:
    self._rows = rows
    with contextlib.suppress(OSError):  # Nothing can be written there: they are read each time.
      with atomic_write(self.path) as file:
        np.save(file, rows, allow_pickle=False)

  def _read(self) -> np.ndarray:
    with contextlib.suppress(OSError, ValueError, EOFError):
      rows = np.load(self.path, allow_pickle=False)
      if rows.dtype == _ROW and rows.ndim == 1 and len(rows):
        return rows
    return np.zeros(1, _ROW)


def _keys(files: Sequence[Path], numbers: np.ndarray) -> np.ndarray:
  """A key of each file as it is, uint64 [n 2]; zeros of one that is gone, or has just changed."""
  now, found = time.time_ns(), bytearray()
  for number in numbers.tolist():
    found += _key(files[number], now)
  return np.frombuffer(found, '<u8').reshape(-1, 2)


def _key(path: Path, now: int) -> bytes:
  try:
    found = path.stat()
  except OSError:
    return bytes(16)
  times = found.st_mtime_ns, found.st_ctime_ns
  if now - max(times) < _SETTLED:
    return bytes(16)
  said = f'{found.st_size} {times} {found.st_ino} {path}'
  return hashlib.sha256(said.encode(errors='surrogateescape')).digest()[:16]
