"""Rows for buckets in which nothing can be read: other records, cut to their size.

Without a cache such are read when they are needed (`buckets.Bucketed.substitutes`). In a cache all
rows of other buckets have another size, so that some are encoded for this one: the same as are read
without it, in the same order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from diffusion_jax.data.buckets import Bucketed, group_of, spares_of
from diffusion_jax.data.cache import identity
from diffusion_jax.data.cache.encoding import Latents
from diffusion_jax.data.cache.rows import Parts, Rows
from diffusion_jax.data.unreadable import about, same_kind


class SpareLatents(Latents):
  """The latents of `Spares`."""

  name = 'spares'


def unreadable_groups(source: Any, empty: Sequence[int]) -> list[int]:
  """The first record of each group of a kind and a bucket of which none can be read.

  empty: numbers of all records that cannot.
  """
  gone = np.zeros(len(source), bool)
  gone[list(empty)] = True
  left, found = gone.copy(), []
  while left.any():
    group = group_of(source, int(left.argmax()))
    if gone[group].all():
      found.append(int(group[0]))
    left[group] = False
  return found


class Spares(Sequence):
  """The records that take the place of those of groups of which none can be read.

  firsts: as of `unreadable_groups`. numbers: of the records in the source, int [m]; spans: of those
  of each group by its first record.
  """

  def __init__(self, source: Bucketed, firsts: Sequence[int]):
    self._source = source
    each = [spares_of(np.asarray(same_kind(source, first))) for first in firsts]
    self.numbers = np.concatenate(each)
    ends = np.cumsum([len(numbers) for numbers in each])
    self.spans = {
      first: range(int(end) - len(numbers), int(end))
      for first, numbers, end in zip(firsts, each, ends, strict=True)
    }
    self._buckets = np.repeat(source.buckets[list(firsts)], [len(numbers) for numbers in each])
    self._cut = {bucket: source.cut_to(bucket) for bucket in np.unique(self._buckets).tolist()}
    if hasattr(source, 'hashes'):
      self.hashes = self._hashes

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index`. Unreadable where it cannot be read."""
    return self._cut[int(self._buckets[index])][int(self.numbers[index])]

  def about(self, index: SupportsIndex) -> dict[str, Any]:
    """A record, perhaps without its picture. Unreadable."""
    return about(self._source, int(self.numbers[index]))

  def _hashes(self, records: np.ndarray) -> np.ndarray:
    """Digests of pictures and the sizes that they are cut to, uint8 [m 16]."""
    found = self._source.hashes(self.numbers[records])
    shapes = np.asarray(self._source.shapes, '<i4')[self._buckets[records]]
    both = zip(found, shapes, strict=True)
    return identity.of_rows(row.tobytes() + shape.tobytes() for row, shape in both)

  @property
  def mixed(self) -> '_Mixed | None':
    """Of which part of a mixture each is; None where they are of none."""
    mixed = getattr(self._source, 'mixed', None)
    return None if mixed is None else _Mixed(mixed, self.numbers)


class _Mixed:
  """What `mixture.Mixed` knows of records of these numbers."""

  def __init__(self, mixed: Any, numbers: np.ndarray):
    self.parts, self._mixed, self._numbers = mixed.parts, mixed, numbers

  def parts_of(self, records: np.ndarray) -> np.ndarray:
    """The numbers of the parts that records are of."""
    return self._mixed.parts_of(self._numbers[records])

  def fields(self, record: int) -> dict[str, Any]:
    """What a record has of its part."""
    return self._mixed.fields(int(self._numbers[record]))


class SpareRows(Sequence):
  """Records out of a cache that take the place of a group's: latents of `Spares`, all else of the
  records themselves.

  span: of the spares. numbers: of all spares in the source.
  """

  def __init__(self, latents: Rows, others: Mapping[str, Rows], span: range, numbers: np.ndarray):
    self._latents, self._others, self._span, self._numbers = latents, others, span, numbers

  def __len__(self) -> int:
    return len(self._span)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Parts]:
    """Return record `index`. Unreadable where it could not be read."""
    place = self._span[index]
    others = {name: rows[int(self._numbers[place])] for name, rows in self._others.items()}
    return {'latents': self._latents[place], **others}
