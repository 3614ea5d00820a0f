"""The order of batches of several buckets, as a function of the seed and a batch's number alone.

The whole stream is epoch after epoch, each with all records in another order. The records of one
bucket, as they come in it, are the stream of that bucket; each `batch_size` of those in a row are a
batch, also across epochs, so that none is left over. Batches come in the order in which their last
records stand in the whole stream: before epoch e there are sum_b floor(e n_b / batch_size) of them,
n_b being the records of bucket b. With one bucket that is the whole stream cut into batches.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

Places = Callable[[np.ndarray, int], np.ndarray]
"""(records [m], epoch) -> the places [m] in that epoch where they stand, in [0, n)."""

_MASK = 2**32 - 1
_ROUNDS = 4
_FEWEST_BITS = 16


def in_order(records: np.ndarray, epoch: int) -> np.ndarray:
  """Return the places of records that are not shuffled."""
  del epoch
  return records


class Shuffled:
  """The order of `grain.MapDataset.shuffle`, for many records at a time and in both directions.

  Grain takes the record at each place from a block cipher on its number, applied until it gives one
  below the number of records (Black & Rogaway 2002). The cipher is Simon (Beaulieu et al. 2013) of
  four rounds, keyed by a `std::seed_seq` of seed plus epoch. Called, it gives the places.
  """

  def __init__(self, count: int, seed: int):
    self._count, bits = count, (count - 1).bit_length()
    self._word = np.uint64(max(bits + bits % 2, _FEWEST_BITS) // 2)
    self._small = self._word * 2 == _FEWEST_BITS
    self._tables = functools.lru_cache(8)(self._whole_epoch)
    stream = grain.MapDataset.source(range(count)).seed(seed).shuffle()
    self._seed = stream._seed
    for place in () if _takes_one_twice(count) else {0, count // 2, count - 1}:
      if self.records(np.array([place]), 0) != stream[place]:
        raise RuntimeError('this version of grain shuffles in another way; install grain 0.2.18.')

  def __call__(self, records: np.ndarray, epoch: int) -> np.ndarray:
    if self._small:
      return self._tables(epoch)[1][records]
    return self._walk(self._undone, records, epoch)

  def records(self, places: np.ndarray, epoch: int) -> np.ndarray:
    """Return the records [m] that stand at places [m] of an epoch."""
    if self._small:
      return self._tables(epoch)[0][places]
    return self._walk(self._done, places, epoch)

  def _keys(self, epoch: int) -> list[int]:
    return _seed_sequence((self._seed + epoch) % 2**32)

  def _walk(self, step: Callable, numbers: np.ndarray, epoch: int) -> np.ndarray:
    keys = self._keys(epoch)
    found = step(np.asarray(numbers, np.uint64), keys)
    while len(beyond := np.flatnonzero(found >= self._count)):
      found[beyond] = step(found[beyond], keys)
    return found.astype(np.int64)

  def _whole_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(records by place, places by record), int64 [n]; for so few, that a walk would be long."""
    every = np.arange(2**_FEWEST_BITS)
    if self._count == 1:
      return every[:1], every[:1]
    done = self._done(every.astype(np.uint64), self._keys(epoch)).astype(np.int64)
    further = np.where(every < self._count, every, done)
    for _ in range(_FEWEST_BITS):  # Each time twice as many steps.
      further = further[further]
    records = further[done[: self._count]]
    places = np.empty_like(records)
    places[records] = every[: self._count]
    return records, places

  def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, Callable]:
    """(left, right, a round's function of one of them and its key)."""
    word, mask = self._word, np.uint64((1 << int(self._word)) - 1)
    turned = lambda x, by: x << np.uint64(by) | x >> (word - np.uint64(by))
    change = lambda x, key: (turned(x, 1) & turned(x, 8) ^ turned(x, 2) ^ np.uint64(key)) & mask
    return values >> word, values & mask, change

  def _done(self, values: np.ndarray, keys: Sequence[int]) -> np.ndarray:
    left, right, change = self._halves(values)
    for k in range(0, _ROUNDS, 2):
      left ^= change(right, keys[k])
      right ^= change(left, keys[k + 1])
    return left << self._word | right

  def _undone(self, values: np.ndarray, keys: Sequence[int]) -> np.ndarray:
    left, right, change = self._halves(values)
    for k in range(_ROUNDS - 1, 0, -2):
      right ^= change(left, keys[k])
      left ^= change(right, keys[k - 1])
    return left << self._word | right


def _takes_one_twice(count: int) -> bool:
  """Whether grain's shuffle takes one record twice and one never.

  Found by counting, grain 0.2.18: its cipher has one bit too few for 65,537 records, 262,145, ...
  """
  most = count - 1
  return most >= 2**_FEWEST_BITS and not most & (most - 1) and most.bit_length() % 2 == 1


class _Shuffle(grain.MapDataset):
  """The shuffle of `Shuffled`, one record at a time."""

  def __init__(self, parent: grain.MapDataset, seed: int):
    super().__init__(parent)
    self._order = Shuffled(len(parent), seed)

  def __len__(self) -> int:
    return len(self._parent)

  def __getitem__(self, index: int) -> Any:
    epoch, place = divmod(index, len(self))
    return self._parent[int(self._order.records(np.array([place]), epoch)[0])]


def shuffled(stream: grain.MapDataset, seed: int) -> grain.MapDataset:
  """Return a stream, seeded alike, with every epoch in another order."""
  return _Shuffle(stream, seed) if _takes_one_twice(len(stream)) else stream.shuffle()


def _seed_sequence(seed: int) -> list[int]:
  """The first four numbers, of 32 bits, of C++'s `std::seed_seq{seed}` (ISO 14882, rand.util)."""
  n, p, q = _ROUNDS, 1, 2
  out = [0x8B8B8B8B] * n
  mixed = lambda x: x ^ x >> 27
  for k in range(n):
    r1 = 1664525 * mixed(out[k % n] ^ out[(k + p) % n] ^ out[k - 1]) & _MASK
    r2 = r1 + (1 if k == 0 else k + seed if k == 1 else k) & _MASK
    out[(k + p) % n] = out[(k + p) % n] + r1 & _MASK
    out[(k + q) % n] = out[(k + q) % n] + r2 & _MASK
    out[k] = r2
  for k in range(n):
    r3 = 1566083941 * mixed(out[k] + out[(k + p) % n] + out[k - 1] & _MASK) & _MASK
    r4 = r3 - k & _MASK
    out[(k + p) % n] ^= r3
    out[(k + q) % n] ^= r4
    out[k] = r4
  return out


class Batch(NamedTuple):
  """A bucket, and the places of its records in the whole stream, int64 [batch_size]."""

  bucket: int
  places: np.ndarray


class BucketOrder:
  """The batches of records that are in buckets; random access, from any thread.

  What an epoch's order takes is kept for few epochs: some 20 bytes a record each.

  Args:
    buckets: of each record, int [n].
  """

  def __init__(self, buckets: np.ndarray, batch_size: int, places: Places):
    self._batch_size, self._places = batch_size, places
    self._count = len(buckets)
    found, self._sizes = np.unique(buckets, return_counts=True)
    self._ids = [int(bucket) for bucket in found]
    grouped = np.argsort(buckets, kind='stable').astype(np.int32)
    self._members = np.split(grouped, np.cumsum(self._sizes)[:-1])
    self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
    self._room = 0
    self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
    self._lock = threading.Lock()

  @property
  def sizes(self) -> dict[int, int]:
    """The records of each bucket that has any."""
    return dict(zip(self._ids, self._sizes.tolist(), strict=True))

  def __getitem__(self, number: int) -> Batch:
    """Return batch `number` of the run."""
    with self._lock:
      epoch, within = self._find(number)
      which, ordinal = (int(column[within]) for column in self._epoch(epoch))
      return Batch(self._ids[which], self._of_stream(which, ordinal))

  def before(self, number: int) -> dict[int, int]:
    """How many of the first `number` batches are of each bucket."""
    with self._lock:
      epoch, within = self._find(number)
      counts = epoch * self._sizes // self._batch_size
      counts += np.bincount(self._epoch(epoch)[0][:within], minlength=len(self._ids))
    return dict(zip(self._ids, counts.tolist(), strict=True))

  def first(self, bucket: int) -> int:
    """The place in the whole stream where the first record of a bucket stands."""
    with self._lock:
      return int(self._of_epoch(self._ids.index(bucket), 0)[0])

  def _find(self, number: int) -> tuple[int, int]:
    """(epoch in which a batch ends, its number among those that do)."""
    before = lambda epoch: int((epoch * self._sizes // self._batch_size).sum())
    epoch = number * self._batch_size // self._count  # It is this one or soon after.
    while before(epoch + 1) <= number:
      epoch += 1
    return epoch, number - before(epoch)

  def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the batches that end in an epoch, in order: (bucket's index, number in its stream)."""
    if epoch not in self._epochs:
      which, ordinals, ends = [], [], []
      for i, n in enumerate(self._sizes.tolist()):
        numbers = np.arange(epoch * n // self._batch_size, (epoch + 1) * n // self._batch_size)
        last = (numbers + 1) * self._batch_size - 1 - epoch * n
        which.append(np.full(len(numbers), i))
        ordinals.append(numbers)
        ends.append(self._of_epoch(i, epoch)[last] if len(last) else last)
      order = np.argsort(np.concatenate(ends))
      self._epochs[epoch] = np.concatenate(which)[order], np.concatenate(ordinals)[order]
      while len(self._epochs) > 3:
        self._epochs.popitem(last=False)
    return self._epochs[epoch]

  def _of_stream(self, i: int, ordinal: int) -> np.ndarray:
    """The places of a batch in the stream of one bucket."""
    first, n, found = ordinal * self._batch_size, len(self._members[i]), []
    for epoch in range(first // n, (first + self._batch_size - 1) // n + 1):
      start, stop = first - epoch * n, first + self._batch_size - epoch * n
      found.append(self._of_epoch(i, epoch)[max(start, 0) : stop] + epoch * self._count)
    return np.concatenate(found)

  def _of_epoch(self, i: int, epoch: int) -> np.ndarray:
    """The places in an epoch of all records of a bucket, ascending."""
    if (i, epoch) in self._kept:
      self._kept.move_to_end((i, epoch))
      return self._kept[i, epoch]
    found = np.sort(self._places(self._members[i], epoch)).astype(np.int32)
    self._kept[i, epoch] = found
    self._room += len(found)
    while self._room > 3 * self._count + 64 * self._batch_size:
      self._room -= len(self._kept.popitem(last=False)[1])
    return found
