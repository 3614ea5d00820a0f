"""Batches from a source: shuffled, sharded by process, and resumable to the exact batch.

All positions are on one stream that every process computes alike: epoch after epoch, each shuffled
anew. Process i of n takes positions i, i + n, ... and batches run across the end of an epoch, so no
example is ever lost, and the order of examples over all processes does not depend on their number.
A transform's randomness comes from the seed and the position alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from diffusion_jax.data.transforms import apply
from diffusion_jax.errors import UserError

_MAX_SEED = 2**32


class Source(Protocol):
  """Random access to records."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Loader:
  """An iterator over batches: dictionaries of arrays [batch_size, ...]; texts as lists.

  With num_epochs=None the stream never ends and every batch is full. With a number of epochs the
  last batch may be smaller, and processes may differ by one example, so also by one batch. Once
  the end is reached, the next `for` begins again from the start.

  Reading and transforms run in threads of this process. An error in one of them is raised by the
  `next` whose batch it belongs to.

  Args:
    source: records by position.
    transforms: from `build_transforms`.
    batch_size: examples per batch of this process.
    seed: in [0, 2**32); determines shuffling and random transforms.
    shuffle: shuffle every epoch anew; otherwise keep the source's order.
    process_index: this process, in [0, process_count).
    process_count: number of processes that read the same source.
    num_epochs: passes over the source; None for no end.
    num_threads: batches that are made at the same time; 0 makes them when asked for.
    prefetch: batches that are made ahead.

  Raises:
    UserError: the source is smaller than one batch over all processes (without end) or than the
      number of processes, or an argument is out of range.
  """

  def __init__(
    self,
    source: Source,
    transforms: Sequence[Callable] = (),
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
  ):
    _check(len(source), batch_size, seed, process_index, process_count, num_epochs)
    self._identity = {
      'seed': seed,
      'shuffle': shuffle,
      'batch_size': batch_size,
      'process_count': process_count,
      'num_epochs': num_epochs,
      'examples': len(source),
    }
    stream = grain.MapDataset.source(source).seed(seed)
    stream = (stream.shuffle() if shuffle else stream).repeat(num_epochs)
    # Before the slice, so that the rng follows the position over all processes.
    stream = stream.random_map(lambda record, rng: apply(transforms, record, rng))
    stream = stream[process_index::process_count]
    self._batches = stream.batch(batch_size, drop_remainder=False, batch_fn=_stack)
    # Grain demands both to be zero, or neither.
    self._options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0
    )
    self._iterator = self._start()

  @property
  def num_batches(self) -> int | None:
    """Batches from start to end; None without end."""
    return None if self._identity['num_epochs'] is None else len(self._batches)

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> dict[str, Any]:
    try:
      return next(self._iterator)
    except StopIteration:
      self._iterator = self._start()
      raise

  def get_state(self) -> dict[str, Any]:
    """What comes next, as JSON-ready values; the same on every process."""
    return {**self._identity, 'position': self._iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from `get_state`: the batches that follow are bitwise those that would have been.

    Raises:
      UserError: the state is of another seed, batch size, number of processes, or source.
    """
    for name, mine in self._identity.items():
      if name not in state or state[name] != mine:
        raise UserError(
          f'The saved data state has {name}={state.get(name, "nothing")} but this run has '
          f'{name}={mine}: use the same {name}, or start a new run.'
        )
    if 'position' not in state:
      raise UserError('The saved data state has no position: restore an older checkpoint.')
    self._iterator.close()
    self._iterator = self._start()
    self._iterator.set_state(state['position'])

  def _start(self) -> Iterator[dict[str, Any]]:
    return iter(self._batches.to_iter_dataset(self._options))


def _stack(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Rows to columns; arrays and numbers are stacked, everything else becomes a list."""
  return {name: _column([record[name] for record in records]) for name in records[0]}


def _column(values: list[Any]) -> Any:
  if not isinstance(values[0], (np.ndarray, np.generic, int, float)):
    return values
  shapes = {np.shape(value) for value in values}
  if len(shapes) > 1:
    raise UserError(
      f'A batch holds arrays of different shapes {sorted(shapes)}: add resize and center_crop.'
    )
  return np.stack(values)


def _check(
  examples: int,
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
  num_epochs: int | None,
) -> None:
  if not 0 <= seed < _MAX_SEED:
    raise UserError(f'The data seed {seed} is out of range: choose one from 0 to {_MAX_SEED - 1}.')
  if not 0 <= process_index < process_count:
    raise UserError(f'Process {process_index} of {process_count} cannot be: count from 0.')
  if batch_size < 1 or (num_epochs is not None and num_epochs < 1):
    raise UserError(
      f'batch_size={batch_size} and num_epochs={num_epochs} must be at least 1: raise them.'
    )
  together = batch_size * process_count
  if num_epochs is None and examples < together:
    raise UserError(
      f'The source has {examples} examples, fewer than one batch of {batch_size} on each of '
      f'{process_count} processes: lower the batch size to {examples // process_count} or add data.'
    )
  if examples < process_count:
    raise UserError(
      f'The source has {examples} examples for {process_count} processes: use fewer processes.'
    )
