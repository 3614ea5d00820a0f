"""Rows of a cache: what frozen networks have made of a record, as bytes, as arrays, as a source.

A row has parts: one for each view of a picture, or for each caption. A shard is a list of bytes:
the parts of its rows, one after another, then the digests of its rows' records, then how many
parts each row has and why rows have none. It is the same in memory and in a file.
"""

import functools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import ml_dtypes
import numpy as np

from diffusion_jax.data.buckets import Some, group_of
from diffusion_jax.data.unreadable import same_kind
from diffusion_jax.errors import Unreadable
from diffusion_jax.files import parse_json

Part = dict[str, np.ndarray]
DIGEST = 16
"""Bytes of the digest of a record."""
DTYPES = {
  'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16), 'int32': np.dtype(np.int32),
}
_MOST_HEADER, _MOST_AXES, _ALIGNED = 4096, 8, 16


class Row(NamedTuple):
  """parts: packed. why: it has none, of a record that cannot be read. weights: of how often each
  part is chosen, () for equally often."""

  parts: Sequence[bytes]
  why: str = ''
  weights: Sequence[float] = ()


def pack(part: Mapping[str, np.ndarray]) -> bytes:
  """Arrays by name as bytes."""
  arrays = {name: np.asarray(value) for name, value in part.items()}
  header = json.dumps([[n, str(a.dtype), list(a.shape)] for n, a in arrays.items()]).encode()
  header += b' ' * (-(len(header) + 4) % _ALIGNED)
  return struct.pack('<I', len(header)) + header + b''.join(a.tobytes() for a in arrays.values())


def unpack(data: bytes) -> Part:
  """The arrays of `pack`, which share the bytes. ValueError unless they are exactly these bytes."""
  (length,) = struct.unpack_from('<I', data) if len(data) >= 4 else (-1,)
  if not 0 <= length <= min(_MOST_HEADER, len(data) - 4):
    raise ValueError(f'a part of {len(data):,} bytes says nothing of what it holds')
  offset, found = 4 + length, {}
  arrays, size = _layout(data[4:offset])
  if offset + size != len(data):
    raise ValueError(f'a part has {len(data) - offset:,} bytes where its arrays have {size:,}')
  for name, dtype, shape, count in arrays:
    found[name] = np.frombuffer(data, dtype, count, offset).reshape(shape)
    offset += count * dtype.itemsize
  return found


@functools.lru_cache(maxsize=256)
def _layout(header: bytes) -> tuple[list[tuple[str, np.dtype, tuple[int, ...], int]], int]:
  """(name, type, shape, number of values of each array, bytes of all); ValueError for others."""
  found = []
  for name, kind, shape in parse_json(header):
    whole = len(shape) <= _MOST_AXES and all(type(edge) is int and edge >= 0 for edge in shape)
    if not isinstance(name, str) or kind not in DTYPES or not whole:
      raise ValueError(f'a part holds an array {str([name, kind, shape])[:100]}')
    found.append((name, DTYPES[kind], tuple(shape), math.prod(shape)))
  return found, sum(count * dtype.itemsize for _, dtype, _, count in found)


def shard_of(rows: Sequence[Row], keys: np.ndarray) -> list[bytes]:
  """Return the bytes of a shard; keys: digests of the rows' records, uint8 [rows DIGEST]."""
  about = {
    'counts': [len(row.parts) for row in rows],
    'why': {str(i): row.why for i, row in enumerate(rows) if row.why},
    'weights': {str(i): list(row.weights) for i, row in enumerate(rows) if len(row.weights)},
  }
  parts = [part for row in rows for part in row.parts]
  return [*parts, keys.tobytes(), json.dumps(about).encode()]


class Shard:
  """An open shard; `get` returns one of its `count` entries. ValueError where it is no shard.

  fault: makes the error of a part that is none, of a sentence.
  """

  def __init__(
    self, get: Callable[[int], bytes], count: int, fault: Callable[[str], Exception] = ValueError
  ):
    if count < 2:
      raise ValueError('it has no end')
    self._get, self._fault, about = get, fault, parse_json(get(count - 1))
    counts, why, weights = (about[name] for name in ('counts', 'why', 'weights'))
    if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != count - 2:
      raise ValueError(f'{count - 2:,} parts are not those of its rows')
    self._count, self._first = count, np.cumsum([0, *counts])
    self.why = {int(row): str(text) for row, text in why.items()}
    self._weights = {int(row): tuple(map(float, values)) for row, values in weights.items()}

  def __len__(self) -> int:
    return len(self._first) - 1

  @property
  def keys(self) -> np.ndarray:
    """Digests of the records of all rows, uint8 [rows DIGEST]."""
    data = self._get(self._count - 2)
    if len(data) != len(self) * DIGEST:
      raise ValueError(f'{len(data):,} bytes of digests are not those of its rows')
    return np.frombuffer(data, np.uint8).reshape(-1, DIGEST)

  def parts(self, row: int) -> int:
    """The number of parts of a row."""
    return int(self._first[row + 1] - self._first[row])

  def weights(self, row: int) -> tuple[float, ...]:
    """The weights of the parts of a row, () where all are alike. ValueError for other numbers."""
    found = self._weights.get(row, ())
    if found and not (len(found) == self.parts(row) and min(found) >= 0 and 0 < sum(found) < 1e30):
      raise ValueError(f'weights {found[:4]} are not those of the parts of row {row}')
    return found

  def part(self, row: int, number: int) -> bytes:
    """The bytes of a part of a row."""
    return self._get(int(self._first[row]) + number)

  def arrays(self, row: int, number: int) -> Part:
    """A part of a row."""
    try:
      return unpack(self.part(row, number))
    except (ValueError, TypeError) as error:
      raise self._fault(str(error)) from error

  def row(self, row: int) -> Row:
    """All of a row."""
    parts = [self.part(row, number) for number in range(self.parts(row))]
    return Row(parts, self.why.get(row, ''), self.weights(row))


class Rows:
  """All rows of one kind, `a_shard` in each shard; `open_shard` returns one of those by number."""

  def __init__(self, count: int, a_shard: int, open_shard: Callable[[int], Shard]):
    self._count, self._a_shard, self._open = count, a_shard, open_shard

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: SupportsIndex) -> 'Parts':
    """Return the parts of a row. Unreadable where its record is."""
    shard, row = divmod(range(self._count)[index], self._a_shard)
    opened = self._open(shard)
    if row in opened.why:
      raise Unreadable(opened.why[row])
    return Parts(opened, row, range(opened.parts(row)))

  def unreadable(self) -> dict[int, str]:
    """Row -> why there is nothing in it."""
    shards = range(-(-self._count // self._a_shard))
    return {
      shard * self._a_shard + row: why
      for shard in shards for row, why in self._open(shard).why.items()
    }


class Parts(Sequence[Part]):
  """Parts of a row, read when they are asked for; values that are no integers become float32."""

  def __init__(self, shard: Shard, row: int, numbers: range):
    self._shard, self._row, self._numbers = shard, row, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return Parts(self._shard, self._row, self._numbers[index])
    found = self._shard.arrays(self._row, self._numbers[index])
    return {
      name: value if value.dtype == np.int32 else value.astype(np.float32)
      for name, value in found.items()
    }

  @property
  def weights(self) -> tuple[float, ...]:
    """Of how often each is chosen, () for equally often."""
    found = self._shard.weights(self._row)
    return tuple(found[number] for number in self._numbers) if found else ()


class CachedSource(Sequence):
  """Records out of a cache: the `Parts` of each kind of rows by name. Unreadable where one is.

  source: what they were made of, whose `buckets`, `order`, `kind` and `mixed` are theirs, too.
  spares: in place of each group of a kind and bucket of which none can be read, by its first.
  """

  def __init__(
    self, kinds: Mapping[str, Rows], source: Any = None,
    spares: Mapping[int, Sequence] | None = None,
  ):
    if len({len(rows) for rows in kinds.values()}) != 1:
      raise ValueError('rows of a cache must be as many of each kind')
    self.kinds = dict(kinds)
    if (buckets := getattr(source, 'buckets', None)) is not None:
      self.buckets, self.order, self.shapes = buckets, source.order, source.shapes
    if (mixed := getattr(source, 'mixed', None)) is not None:
      self.mixed = mixed
    if (kind := getattr(source, 'kind', None)) is not None:
      self.kind = kind
    self._spares = dict(spares or {})

  def __len__(self) -> int:
    return len(next(iter(self.kinds.values())))

  def __getitem__(self, index: SupportsIndex) -> dict[str, Parts]:
    """Return record `index`. Unreadable where it could not be read."""
    return {name: rows[index] for name, rows in self.kinds.items()}

  def substitutes(self, index: int) -> Iterator[Sequence]:
    """Yield the records that may take the place of one: those of its kind and bucket, or spares."""
    if not hasattr(self, 'buckets'):
      yield Some(self, same_kind(self, index))
      return
    group = group_of(self, index)
    yield Some(self, group)
    if (spares := self._spares.get(int(group[0]))) is not None:
      yield spares
