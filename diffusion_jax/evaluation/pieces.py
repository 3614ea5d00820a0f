"""Work in numbered pieces whose results are files, and the images kept of it.

A piece is complete or absent, so after a kill the next start makes exactly what is missing, with
any number of processes.
"""

import io
import json
import math
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, read_object, reading

PLAN = 'plan.json'
ERRORS, THUMBNAILS, EDGES, EACH = 'trouble', 'thumbnails', 'edges', 'each:'


class Made(NamedTuple):
  """The images of a piece: uint8 [h w 3] each, None where `errors` says why there is none.

  each: values of the single images by name, [n].
  """

  images: list[np.ndarray | None]
  errors: list[str]
  each: Mapping[str, np.ndarray] = MappingProxyType({})


class Chunks:
  """`count` pieces of `size` items each, of `total` items; the last may be smaller.

  Processes share the directory: piece i is made by process i modulo their number. plan: decides the
  results, JSON-ready; UserError where the directory holds pieces of another.
  """

  def __init__(self, directory: Path, plan: Mapping[str, Any], *, total: int, size: int):
    self.directory, self.total, self.size = Path(directory), total, size
    self.count = -(-total // size)
    self._check({**plan, 'total': total, 'chunk_size': size})

  def _check(self, plan: dict[str, Any]) -> None:
    plan = json.loads(json.dumps(plan))
    file = self.directory / PLAN
    remedy = f'delete {self.directory} to begin anew'
    known = read_object(file, remedy=remedy) if file.exists() else None
    if known is None:
      with atomic_write(file) as new:
        new.write(json.dumps(plan, indent=2).encode())
    elif known != plan:
      names = sorted(k for k in {*known, *plan} if known.get(k) != plan.get(k))
      first = names[0]
      raise UserError(
        f'{self.directory} holds results of another evaluation ({first} was {known.get(first)!r}, '
        f'now {plan.get(first)!r}); choose another --out, or delete it.'
      )

  def items(self, index: int) -> range:
    return range(index * self.size, min((index + 1) * self.size, self.total))

  def missing(self, lacking: Callable[[range], bool] | None = None) -> list[int]:
    """This process's pieces to make, also damaged ones and those with items `lacking` elsewhere."""
    own = range(jax.process_index(), self.count, jax.process_count())
    return [i for i in own if not self._whole(i) or (lacking and lacking(self.items(i)))]

  def save(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the results of a piece, one row for each of its items, all of it or nothing."""
    rows = len(self.items(index))
    wrong = [name for name, value in arrays.items() if len(value) != rows]
    if wrong:
      raise ValueError(f'{wrong[0]} has {len(arrays[wrong[0]])} rows; piece {index} has {rows}.')
    with atomic_write(self._path(index), flushed=True) as file:
      np.savez(file, **arrays)

  def load(self, index: int, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The results of a piece, `without` some; UserError where damaged, until the next start."""
    path = self._path(index)
    with reading(path, 'is damaged', 'start again to make it anew'):
      with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in without}

  def joined(self, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The results of all items, [total ...] each, memory-mapped but for texts.

    Each in an unnamed file of the same folder, gone with the array. Half-written files of killed
    processes are deleted: with all pieces complete, nobody writes one.
    """
    for left in self.directory.glob('.*.npz.*.tmp'):
      left.unlink(missing_ok=True)
    texts: dict[str, list[np.ndarray]] = {}
    found: dict[str, np.ndarray] = {}
    for index in range(self.count):
      items = self.items(index)
      for name, values in self.load(index, without).items():
        if values.dtype.kind == 'U':
          texts.setdefault(name, []).append(values)
          continue
        if name not in found:
          found[name] = self._unnamed((self.total, *values.shape[1:]), values.dtype)
        found[name][items.start : items.stop] = values
    return found | {name: np.concatenate(parts) for name, parts in texts.items()}

  def _unnamed(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not math.prod(shape) * dtype.itemsize:
      return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=self.directory) as file:
      return np.memmap(file, dtype, 'w+', shape=shape)

  def _path(self, index: int) -> Path:
    return self.directory / f'{index:06d}.npz'

  def _whole(self, index: int) -> bool:
    """Return whether the piece has all of its bytes; its archive has checksums."""
    try:
      with reading(self._path(index)), zipfile.ZipFile(self._path(index)) as archive:
        return archive.testzip() is None
    except UserError:
      return False


KINDS = ('png', 'tar')


class Keeper:
  """Keep the images of a piece: NUMBER.png each, or one tar file; UserError for another kind.

  They are complete before its features, so that a start after a kill finds or makes all.
  """

  def __init__(self, directory: Path, kind: str):
    if kind not in KINDS:
      raise UserError(f'Pictures cannot be kept as {kind!r}; choose {" or ".join(KINDS)}.')
    self._directory, self._kind = directory, kind

  def has(self, items: range) -> bool:
    if self._kind == 'tar':
      return self._archive(items).is_file()
    return any(self._file(number).is_file() for number in items)  # Damaged ones are not there.

  def __call__(self, items: range, made: Made) -> None:
    images = [pair for pair in zip(items, made.images, strict=True) if pair[1] is not None]
    if self._kind == 'png':
      for number, image in images:
        with atomic_write(self._file(number)) as file:
          file.write(_png(image))
      return
    with (
      atomic_write(self._archive(items)) as file,
      tarfile.open(fileobj=file, mode='w') as archive,
    ):
      for number, image in images:
        data = _png(image)
        entry = tarfile.TarInfo(self._file(number).name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))

  def _file(self, number: int) -> Path:
    return self._directory / f'{number:06d}.png'

  def _archive(self, items: range) -> Path:
    return self._directory / f'{items.start:06d}-{items.stop - 1:06d}.tar'


def _png(image: UInt8[np.ndarray, 'h w 3']) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format='PNG')
  return buffer.getvalue()


class Thumbnails:
  """Small pictures of a work's images by number; None for one without."""

  def __init__(self, chunks: Chunks):
    self._chunks = chunks

  def __getitem__(self, number: int) -> UInt8[np.ndarray, 't t 3'] | None:
    arrays = self._chunks.load(number // self._chunks.size)
    if THUMBNAILS not in arrays:
      return None
    return arrays[THUMBNAILS][number % self._chunks.size]
