"""Where rows of a cache are kept: in memory, or in a folder of files that outlive the process.

Both are filled by `fill`: shards are dealt out to the processes, each of which encodes its own on
its own devices.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffusion_jax.data.cache.encoding import Encoder
from diffusion_jax.data.cache.rows import DIGEST, Row, Rows, Shard, shard_of
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import say
from diffusion_jax.parallel.processes import A_DAY, in_step

_PIECE = 2**22
"""Bytes of each process that devices pass on at a time."""


class Store(Protocol):
  """Rows of one kind."""

  def begin(self, encoder: Encoder) -> list[int]:
    """Return the numbers of shards that are missing; the same in every process."""

  def kept(self, number: int) -> Row | None:
    """Return the row of a record that is in another shard."""

  def put(self, number: int, rows: Sequence[Row]) -> None:
    """Keep a shard."""

  def end(self) -> Rows:
    """Return all rows, once every process has called it."""

  def empty(self, rows: Rows) -> Sequence[int]:
    """Return the numbers of the records that could not be read."""


def fill(encoder: Encoder, store: Store) -> Rows:
  """Encode what a store lacks, in shares over the processes, and return all rows.

  UserError, in all processes, where a share cannot be encoded or kept, or no record can be read.
  """
  missing, name = store.begin(encoder), encoder.name
  if missing:
    encoder.ready()
  mine = missing[jax.process_index() :: jax.process_count()]
  spans = [span_of(encoder, number) for number in mine]
  hidden = not encoder.options.progress or jax.process_index() > 0
  counts = {'kept': 0, 'encoded': 0}

  def work() -> None:
    with tqdm(
      total=sum(map(len, spans)), desc=f'encoding {name}', unit='rec', leave=False,
      disable=hidden or not spans,
      smoothing=0.05,
    ) as bar:
      for number, span in zip(mine, spans, strict=True):
        store.put(number, _rows(encoder, store, span, counts))
        bar.update(len(span))

  began = time.monotonic()
  in_step(f'cache/{name}', work, (UserError,), A_DAY)
  rows = store.end()
  for number in store.empty(rows):  # So that all processes name and count them.
    can_read(encoder, number)
  _check_any_readable(rows)
  if counts['encoded'] and not hidden and store.says and len(encoder) > 1:
    seconds = time.monotonic() - began
    say(
      f'{name} of {counts["encoded"]:,} records were encoded in {seconds:.1f} s '
      f'({counts["encoded"] / seconds:.1f} a second)'
      + f'; {counts["kept"]:,} were there' * bool(counts['kept']),
      'diffusion_jax: ',
    )
  return rows


def span_of(encoder: Encoder, number: int) -> range:
  """Return the numbers of the records of a shard."""
  first = number * encoder.rows
  return range(first, min(first + encoder.rows, len(encoder)))


def _rows(encoder: Encoder, store: Store, span: range, counts: dict[str, int]) -> list[Row]:
  kept = {n: row for n in span if (row := store.kept(n)) is not None}
  new = [n for n in span if n not in kept]
  counts['kept'] += len(kept)
  counts['encoded'] += len(new)
  encoded = dict(zip(new, encoder.encode(new), strict=True)) if new else {}
  return [kept[n] if n in kept else encoded[n] for n in span]


def can_read(encoder: Encoder, number: int) -> bool:
  """Return whether a record can be read; a source that counts those that cannot counts it."""
  try:
    encoder.read(number)
  except Unreadable:
    return False
  return True


def _check_any_readable(rows: Rows) -> None:
  first = ''
  for number in range(len(rows)):
    try:
      rows[number]
      return
    except Unreadable as error:
      first = first or str(error)
  if first:
    raise UserError(f'no record can be read, the first because {first}')


class MemoryStore:
  """All rows in the memory of every process."""

  says = False

  def begin(self, encoder: Encoder) -> list[int]:
    self._encoder, self._own = encoder, {}
    self._count = -(-len(encoder) // encoder.rows)
    return list(range(self._count))

  def kept(self, number: int) -> Row | None:
    del number

  def put(self, number: int, rows: Sequence[Row]) -> None:
    self._own[number] = shard_of(rows, np.zeros((len(rows), DIGEST), np.uint8))

  def end(self) -> Rows:
    shards = self._own if jax.process_count() == 1 else _exchanged(self._own, self._count)
    opened = [Shard(shards[i].__getitem__, len(shards[i])) for i in range(self._count)]
    return Rows(len(self._encoder), self._encoder.rows, opened.__getitem__)

  def empty(self, rows: Rows) -> Sequence[int]:
    return list(rows.unreadable())


def _exchanged(own: Mapping[int, list[bytes]], count: int) -> dict[int, list[bytes]]:
  """Return the shards of all processes; shard n is of process n modulo their number."""
  found, processes = {}, jax.process_count()
  for first in range(0, count, processes):
    mine = own.get(first + jax.process_index(), [])
    data = np.array([len(mine), *map(len, mine)], np.uint32).tobytes() + b''.join(mine)
    turn = range(first, min(first + processes, count))
    for number, part in zip(turn, _gathered(data), strict=False):
      lengths = np.frombuffer(part, np.uint32, 1 + np.frombuffer(part, np.uint32, 1)[0])
      ends = np.cumsum([lengths.nbytes, *lengths[1:]])
      found[number] = [part[a:b] for a, b in itertools.pairwise(ends)]
  return found


def _gathered(data: bytes) -> list[bytes]:
  """Return what every process gives, in their order, piece by piece through the devices."""
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  pieces = []
  for first in range(0, int(max(sizes)), _PIECE):
    piece = np.zeros(_PIECE, np.uint8)
    own = np.frombuffer(data[first : first + _PIECE], np.uint8)
    piece[: len(own)] = own
    pieces.append(np.asarray(multihost_utils.process_allgather(piece)))
  every = np.concatenate(pieces, axis=1)
  return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]
