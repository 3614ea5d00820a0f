"""Where rows of a cache are kept: in memory, or in a folder of files that outlive the process.

Both are filled by `fill`: shards are dealt out to the processes, each of which encodes its own on
its own devices.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from diffusion_jax.data.cache.encoding import Encoder
from diffusion_jax.data.cache.rows import DIGEST, Row, Rows, Shard, shard_of
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import say
from diffusion_jax.parallel.processes import A_DAY, gather_bytes, in_step

_A_LINE = 60.0
"""Seconds between two lines on how far the work is."""


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


def fill(encoder: Encoder, store: Store) -> 'Filled':
  """Encode what a store lacks, in shares over the processes, and return all rows.

  UserError, in all processes, where a share cannot be encoded or kept, or no record can be read.
  """
  missing, name = store.begin(encoder), encoder.name
  if missing:
    encoder.ready()
  mine = missing[jax.process_index() :: jax.process_count()]
  work = _Work(encoder, store, [span_of(encoder, number) for number in mine])

  def run() -> None:
    for number, span in zip(mine, work.spans, strict=True):
      store.put(number, work.rows(span))
      work.done(len(span))

  with work.bar:
    in_step(f'cache/{name}', run, (UserError,), A_DAY)
  rows = store.end()
  for number in (empty := store.empty(rows)):  # So that all processes name and count them.
    can_read(encoder, number)
  _check_any_readable(rows)
  work.say_all()
  return Filled(rows, empty)


class Filled(NamedTuple):
  """All rows, and the numbers of those that are empty, as their records cannot be read."""

  rows: Rows
  empty: Sequence[int]


class _Work:
  """What this process encodes, and how far it is: on the terminal, in the status and in the log."""

  def __init__(self, encoder: Encoder, store: Store, spans: Sequence[range]):
    self.spans, self._encoder, self._store = spans, encoder, store
    self._all, self._done, self._kept, self._encoded = sum(map(len, spans)), 0, 0, 0
    self._shown = encoder.options.progress and jax.process_index() == 0
    self._began = self._said = time.monotonic()
    self.bar = tqdm(
      total=self._all, desc=f'encoding {encoder.name}', unit='rec', leave=False,
      disable=not self._shown or not spans, smoothing=0.05,
    )
    self._tell(now=True)

  def rows(self, span: range) -> list[Row]:
    """Return the rows of a shard, those that are known as they are."""
    kept = {n: row for n in span if (row := self._store.kept(n)) is not None}
    new = [n for n in span if n not in kept]
    self._kept += len(kept)
    self._encoded += len(new)
    encoded = dict(zip(new, self._encoder.encode(new), strict=True)) if new else {}
    return [kept[n] if n in kept else encoded[n] for n in span]

  def done(self, records: int) -> None:
    """Count records of this process whose shard is kept; a line a minute says how many."""
    self._done += records
    self.bar.update(records)
    self._tell()
    if self._shown and self._store.says and time.monotonic() - self._said > _A_LINE:
      self._said = time.monotonic()
      say(self._sentence(), 'diffusion_jax: ')

  def _speed(self) -> float:
    """Records a second, of this process."""
    return self._encoded / max(time.monotonic() - self._began, 1e-3)

  def _sentence(self) -> str:
    of = ' of this process' * (jax.process_count() > 1)
    return (f'encoding {self._encoder.name}: {self._done:,} of {self._all:,} records{of} '
            f'({self._speed():.1f} a second)')

  def _tell(self, now: bool = False) -> None:
    if self._all:
      self._encoder.options.report(
        'encoding', now=now, message=self._sentence(),
        encoding={'kind': self._encoder.name, 'records': self._done, 'of': self._all,
                  'records_per_second': self._speed()},
      )

  def say_all(self) -> None:
    """Say how many records were encoded, and how fast."""
    if not (self._encoded and self._shown and self._store.says and len(self._encoder) > 1):
      return
    seconds = time.monotonic() - self._began
    say(
      f'{self._encoder.name} of {self._encoded:,} records were encoded in {seconds:.1f} s '
      f'({self._encoded / seconds:.1f} a second)'
      + f'; {self._kept:,} were there' * bool(self._kept),
      'diffusion_jax: ',
    )


def span_of(encoder: Encoder, number: int) -> range:
  """Return the numbers of the records of a shard."""
  first = number * encoder.rows
  return range(first, min(first + encoder.rows, len(encoder)))


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
    for number, part in zip(turn, gather_bytes(data), strict=False):
      lengths = np.frombuffer(part, np.uint32, 1 + np.frombuffer(part, np.uint32, 1)[0])
      ends = np.cumsum([lengths.nbytes, *lengths[1:]])
      found[number] = [part[a:b] for a, b in itertools.pairwise(ends)]
  return found
