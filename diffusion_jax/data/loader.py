"""Batches from a source: shuffled, split over processes, and resumable to the exact batch.

Positions are on one stream, the same in every process: epoch after epoch, each shuffled anew.
Global batch k is positions k B to k B + B - 1, whatever the number of processes and devices; a
process reads those of its devices. Batches run across epochs, so no example is lost. The randomness
of a transform depends on seed and position alone. Where examples are in buckets, global batch k is
the positions that `data.order` gives it, all of one bucket.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from diffusion_jax.data.order import BucketOrder, Shuffled, in_order, shuffled
from diffusion_jax.data.transforms import apply
from diffusion_jax.data.unreadable import replacement
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.limits import check_seed
from diffusion_jax.types import Source


class Loader:
  """An endless iterator over batches: dictionaries of arrays [rows, ...]; texts as lists.

  Reading and transforms run in threads. An error is raised by the `next` of its batch and by every
  later one. Only unreadable examples are replaced, by others that follow from seed and position
  (`data.unreadable`). UserError: a source smaller than a global batch, or an argument out of range.

  Args:
    source: with `buckets`, int [n], and `order` where its examples are in buckets (`Bucketed`);
      with `mixed` where its records are not all read equally often (`mixture.Mixed`).
    batch_size: examples per global batch, over all processes.
    rows: examples of a global batch to make, such as `parallel.mesh.local_rows`; None for all.
    seed: in [0, 2**32); determines shuffling and random transforms.
    shuffle: shuffle every epoch anew; otherwise keep the source's order.
    num_threads: batches made at the same time; 0 makes them on demand.
    prefetch: batches made ahead, at least one for each thread.
  """

  def __init__(
    self,
    source: Source,
    transforms: Sequence[Callable] = (),
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    seed: int,
    shuffle: bool = True,
    num_threads: int = 2,
    prefetch: int = 4,
  ):
    mixed = getattr(source, 'mixed', None)
    _check(len(source if mixed is None else mixed), batch_size, seed, num_threads)
    # What is left out may change without another order: threads, processes, and who has which row.
    self._identity = {
      'seed': seed, 'shuffle': shuffle, 'batch_size': batch_size, 'examples': len(source),
    }
    self._order = None
    if (buckets := getattr(source, 'buckets', None)) is not None:
      self._identity['buckets'] = source.order
      if mixed is None:
        places = Shuffled(len(source), seed) if shuffle else in_order
      else:
        places, buckets = mixed.order(seed, shuffle), buckets[mixed.records(np.arange(len(mixed)))]
      self._order = BucketOrder(buckets, batch_size, places)
    # Numbers, and not records, so that what takes the place of one can follow from its position.
    if mixed is None:
      stream = grain.MapDataset.source(range(len(source))).seed(seed)
      stream, more = shuffled(stream, seed) if shuffle else stream, lambda index: {}
    else:
      self._identity['mixture'] = mixed.text
      stream, more = mixed.stream(seed, shuffle), mixed.fields
    # Before the rows are chosen, so that the rng follows the position in the one stream.
    self._stream = stream.repeat().random_map(
      lambda index, rng: apply(transforms, _record(source, index, rng) | more(index), rng)
    )
    self._batches = _Batches(self._stream, batch_size, rows, self._order)
    # Grain demands both to be zero, or neither.
    self._options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0
    )
    self._position = 0
    self._iterator = self._start()

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> dict[str, Any]:
    try:
      batch = next(self._iterator)
    except BaseException:  # Ctrl-C while waiting, too.
      self._go_to(self._position)  # Grain would go on behind the batch that failed.
      raise
    self._position += 1
    return batch

  def buckets_until(self, batches: int) -> list[int]:
    """Return the buckets of the batches from the next one up to that number, each once: the next
    batch's first, then roughly as they come."""
    if self._order is None:
      return [0]
    next_one = self._order[self._position].bucket
    now, then = self._order.before(self._position), self._order.before(batches)
    wait = lambda bucket: ((now[bucket] + 1) / self._order.sizes[bucket], bucket)
    others = [b for b in now if b != next_one and then[b] > now[b]]
    return [next_one, *sorted(others, key=wait)]

  def spec(self, bucket: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes [batch_size, ...] and types of a global batch on the device, without texts.

    bucket: the one it is of; None for that of the next batch.
    """
    if self._order is None:
      example = _stack([self._stream[0]])
    else:
      bucket = self._order[self._position].bucket if bucket is None else bucket
      example = _stack([self._stream[self._order.first(bucket)]])
    return {
      name: jax.ShapeDtypeStruct(
        (self._identity['batch_size'], *column.shape[1:]),
        jax.dtypes.canonicalize_dtype(column.dtype),
      )
      for name, column in example.items() if isinstance(column, np.ndarray)
    }

  def get_state(self) -> dict[str, Any]:
    """Return what comes next, the same on every process; position: global batches so far."""
    return {**self._identity, 'position': self._position}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continue from `get_state`, bitwise, with any number of threads and processes; reads nothing.

    UserError: the state is of another seed, batch size or source.
    """
    for name in {**self._identity, 'buckets': None, 'mixture': None}:
      mine, saved = (where.get(name, 'nothing') for where in (self._identity, state))
      if saved != mine:
        raise UserError(
          f'The saved data state has {name}={saved} but this run has {name}={mine}: use the same '
          f'{name}, or start a new run.'
        )
    if not isinstance(state.get('position'), int):
      raise UserError('The saved data state has no position: restore an older checkpoint.')
    self._go_to(state['position'])

  def _go_to(self, position: int) -> None:
    self._iterator.close()
    self._position = position
    self._iterator = self._start()
    self._iterator.set_state({'next_index': position})

  def _start(self) -> Iterator[dict[str, Any]]:
    return iter(self._batches.to_iter_dataset(self._options))


class LikeLoader:
  """The shapes of a loader's batches, with so many examples in each; no batch is made."""

  def __init__(self, loader: Loader, batch_size: int):
    self._loader, self._batch_size = loader, batch_size
    self.buckets_until = loader.buckets_until

  def spec(self, bucket: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of a global batch, as `Loader.spec`."""
    return {
      name: jax.ShapeDtypeStruct((self._batch_size, *leaf.shape[1:]), leaf.dtype)
      for name, leaf in self._loader.spec(bucket).items()
    }


class _Batches(grain.MapDataset):
  """Batch k: the examples at k * batch_size + rows of a stream, or where `order` has them, stacked.
  """

  def __init__(
    self, stream: grain.MapDataset, batch_size: int, rows: np.ndarray | None,
    order: BucketOrder | None,
  ):
    super().__init__(stream)
    self._stream, self._batch_size, self._order = stream, batch_size, order
    self._rows = range(batch_size) if rows is None else [int(row) for row in rows]
    if not self._rows or not all(0 <= row < batch_size for row in self._rows):
      raise ValueError(f'rows {self._rows} are not rows of a batch of {batch_size}.')

  def __len__(self) -> int:
    return len(self._stream) // self._batch_size

  def __getitem__(self, index: int) -> dict[str, Any]:
    if self._order is None:
      first = index * self._batch_size
      return _stack([self._stream[first + row] for row in self._rows])
    places = self._order[index].places
    return _stack([self._stream[int(places[row])] for row in self._rows])

  def __str__(self) -> str:
    return f'batches of {self._batch_size}'


def _record(source: Source, index: int, rng: np.random.Generator) -> dict[str, Any]:
  try:
    return source[index]
  except Unreadable:
    return replacement(source, index, rng)


def _stack(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Rows to columns; arrays and numbers are stacked, everything else becomes a list.

  What some records have only, such as weights of captions, is left out.
  """
  names = [name for name in records[0] if all(name in record for record in records)]
  return {name: _column([record[name] for record in records]) for name in names}


def _column(values: list[Any]) -> Any:
  if not isinstance(values[0], (np.ndarray, np.generic, int, float)):
    return values
  shapes = {np.shape(value) for value in values}
  if len(shapes) > 1:
    raise UserError(
      f'A batch holds arrays of different shapes {sorted(shapes)}: add resize and center_crop.'
    )
  return np.stack(values)


def _check(examples: int, batch_size: int, seed: int, num_threads: int) -> None:
  check_seed(seed, 'The data seed')
  if batch_size < 1:
    raise UserError(f'batch_size is {batch_size}: it must be at least 1.')
  if num_threads < 0:
    raise UserError(f'{num_threads} data threads cannot be: give 0 or more.')
  if examples < batch_size:
    raise UserError(
      f'The source has {examples} examples, fewer than one batch of {batch_size}: lower the batch '
      f'size to {examples} or add data.'
    )
