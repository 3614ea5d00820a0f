"""Pictures by number, undecoded, with the texts that belong to them: what a kind of source reads.

A new kind is a class of `Entries`, and a row in `registry.SOURCES` that makes `PictureSource`s of
it; decoding, cutting, splits and bad records are the same for all.
"""

import concurrent.futures
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.captions import lines_of
from diffusion_jax.data.fields import Caption, filled, weights_of
from diffusion_jax.data.images import read_size
from diffusion_jax.data.splits import (
  FILES,
  READERS,
  RECORDS,
  content_hash,
  name_hash,
  of_names,
  of_texts,
  spread,
)
from diffusion_jax.errors import Unreadable

_AT_A_TIME = 256
DIGEST = 16
"""Bytes of a record's hash."""


class Entry(NamedTuple):
  """A picture that is not decoded yet.

  name: the record's id. where: what errors call the picture. picture: its path, or its bytes.
  captions: texts, None where there is a label alone. weights: as many, for how often each is
  chosen; () for equally often. label: its class, None without.
  """

  name: str
  where: str
  picture: Path | bytes
  captions: Sequence[str] | None = None
  weights: Sequence[float] = ()
  label: str | None = None

  @property
  def source(self) -> Path | BinaryIO:
    """What `data.images` decodes."""
    return io.BytesIO(self.picture) if isinstance(self.picture, bytes) else self.picture

  def data(self) -> bytes:
    """The picture's bytes. OSError: its file is gone."""
    return self.picture if isinstance(self.picture, bytes) else self.picture.read_bytes()


class Entries(Sequence[Entry]):
  """Entries by number; `len()` and `entries[i]`, which raises Unreadable, are a kind's own.

  sizes: (height, width) of the upright pictures, int32 [n 2], where they are known without reading
  any; 0 of what cannot be read. digests: uint8 [n DIGEST], likewise. labels: one for each, '' where
  there is none, or None.
  """

  sizes: np.ndarray | None = None
  digests: np.ndarray | None = None
  labels: Sequence[str] | None = None
  quick = 20_000
  """Pictures whose content may be looked at whenever a source is opened."""

  def about(self, index: int) -> Entry:
    """Entry `index`, with an empty picture where a kind need not read it. Unreadable."""
    return self[index]

  def read(self, index: int) -> bytes:
    """The bytes of a picture, as they were stored. Unreadable."""
    return self[index].data()

  def name(self, index: int) -> str:
    """The id of a record."""
    return self[index].name

  def hash(self, index: int) -> bytes:
    """The digest of a picture's bytes, `splits.content_hash`; of its number if it is unreadable."""
    try:
      return content_hash(io.BytesIO(self.read(index)))
    except Exception:  # An error names it when the picture is read.
      return name_hash(b'%d' % index)

  def original_sizes(self, numbers: np.ndarray) -> np.ndarray:
    """(height, width) of upright pictures, int32 [n 2]; 0 0 of what cannot be read."""
    if self.sizes is not None:
      return np.asarray(self.sizes[numbers], np.int32)
    return np.fromiter(_in_threads(self._size, numbers), np.dtype((np.int32, 2)), len(numbers))

  def _size(self, index: int) -> tuple[int, int]:
    try:
      entry = self[index]
      return read_size(entry.source, entry.where)
    except Unreadable:
      return 0, 0

  def hashes(self, numbers: np.ndarray) -> np.ndarray:
    """Digests of pictures as they were stored, uint8 [n DIGEST]: of length, start and end."""
    return self.read_hashes(numbers) if self.digests is None else np.asarray(self.digests[numbers])

  def lengths(self) -> np.ndarray | None:
    """Bytes of each picture, int64 [n], where they are known without reading any."""
    return None

  def read_hashes(self, numbers: np.ndarray) -> np.ndarray:
    """As `hashes`, of the pictures as they are now."""
    found = b''.join(_in_threads(lambda i: self.hash(i)[:DIGEST], numbers))
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST)

  def fingerprint(self, numbers: np.ndarray) -> dict[str, str]:
    """Hashes that change with these records, in order: their pictures, or some if none are kept,
    and the texts of some."""
    some = np.asarray(numbers)[spread(len(numbers), FILES if self.digests is None else RECORDS)]
    known = self.read_hashes(some) if self.digests is None else self.hashes(numbers)
    return {
      'pictures': of_names([f'{len(numbers)}'], [known.tobytes()]),
      'captions': of_texts(map(self._texts, some.tolist())),
    }

  def also_in(self, train: 'Entries') -> int | None:
    """How many pictures have the content of one of others; None where more than `quick` would have
    to be looked at."""
    sides = train, self
    lengths = [each.lengths() for each in sides]
    chosen = [np.arange(len(each)) for each in sides]
    if all(each is not None for each in lengths):
      common = np.intersect1d(*lengths)
      chosen = [np.flatnonzero(np.isin(each, common)) for each in lengths]
    if all(each.digests is not None for each in sides):
      found = [each.hashes(numbers) for each, numbers in zip(sides, chosen, strict=True)]
    elif sum(map(len, chosen)) > min(each.quick for each in sides):
      return None
    else:
      found = [each.read_hashes(numbers) for each, numbers in zip(sides, chosen, strict=True)]
    known, own = ({row.tobytes() for row in rows} for rows in found)
    unreadable = {name_hash(b'%d' % number)[:DIGEST] for number in chosen[1].tolist()}
    same = (known & own) - unreadable
    return sum(row.tobytes() in same for row in found[1])

  def _texts(self, index: int) -> list:
    """The name, captions, weights and label; none of a record that cannot be read."""
    try:
      entry = self[index]
    except Unreadable:
      return []
    return [entry.name, list(entry.captions or ()), list(entry.weights), entry.label]


def _in_threads(function: Callable[[int], Any], numbers: np.ndarray) -> Iterator[Any]:
  """What a function gives for each number, in order; threads take many at a time."""
  size = min(_AT_A_TIME, -(-len(numbers) // (4 * READERS)))
  blocks = (numbers[i : i + size].tolist() for i in range(0, len(numbers), max(size, 1)))
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    for found in pool.map(lambda block: [*map(function, block)], blocks):
      yield from found


class Classes(Sequence[str]):
  """Labels by number, of names; '' for a number that has none, such as -1."""

  def __init__(self, numbers: np.ndarray, names: Sequence[str]):
    self.numbers, self.names = numbers, names

  @classmethod
  def of(cls, labels: Iterable[str | None]) -> 'Classes':
    """These labels, None for none."""
    names: dict[str, int] = {}
    found = [-1 if each is None else names.setdefault(each, len(names)) for each in labels]
    return cls(np.asarray(found, np.int32), [*names])

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> str:
    number = int(self.numbers[index])
    return self.names[number] if 0 <= number < len(self.names) else ''


class Described(Entries):
  """Entries with captions and labels of their own, and `data.caption` for those without.

  config: of its `caption` and `caption_column`.
  """

  def __init__(self, config: DataConfig):
    self.lines, self.column = lines_of(config.caption, 'data.caption'), config.caption_column

  def entry(
    self, name: str, where: str, picture: Path | bytes, captions: Sequence[Caption],
    label: str | None = None,
  ) -> Entry:
    """An entry with these captions, or those of data.caption, or its label. Unreadable: none."""
    general = [] if captions else [*map(Caption, filled(self.lines, name, label))]
    if not (captions or general) and label is None:
      raise Unreadable(
        f'the picture {where} has no caption; give it one, or set data.caption.', 'no caption'
      )
    chosen = captions or general
    return Entry(
      name, where, picture, [caption.text for caption in chosen] or None, weights_of(chosen), label
    )
