"""Records of several sizes: each is in the bucket of the size whose ratio is nearest to its own."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, SupportsIndex

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data.splits import spread
from diffusion_jax.data.transforms import apply
from diffusion_jax.data.unreadable import same_kind
from diffusion_jax.data.wrapped import Wrapped
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.processes import A_DAY, in_step
from diffusion_jax.sizes import Shape, nearest_to_square
from diffusion_jax.types import Source

_SPARES = 64


def assign(originals: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
  """Return the number of the nearest of `shapes` for pictures, int16 [n].

  Nearest is the logarithm of height / width; of several of one ratio the largest that the picture
  covers, or the smallest. What has no size goes to the one nearest to a square.

  Args:
    originals: height and width of upright pictures, int [n 2]; 0 0 where they are not known.
  """
  known = (originals > 0).all(axis=1)
  height, width = np.where(known[:, None], originals, 1).astype(np.float64).T
  by_ratio: dict[tuple[int, int], list[Shape]] = {}
  for shape in sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape)):
    common = math.gcd(*shape)
    by_ratio.setdefault((shape[0] // common, shape[1] // common), []).append(shape)
  logs = np.log([h / w for h, w in by_ratio])
  nearest = np.searchsorted((logs[1:] + logs[:-1]) / 2, np.log(height / width))
  found = np.empty(len(originals), np.int16)
  for i, same in enumerate(by_ratio.values()):
    mine = nearest == i
    # At least as high and as wide, for they are of one ratio.
    covered = sum((height[mine] >= h) & (width[mine] >= w) for h, w in same[1:])
    found[mine] = np.array([shapes.index(shape) for shape in same])[covered]
  found[~known] = shapes.index(nearest_to_square(tuple(shapes)))
  return found


class Bucketed(Wrapped):
  """Records of a source, each at the size of its bucket; all else is the source's.

  buckets: of each record its number in `shapes`, int16 [n].
  """

  def __init__(self, source: Any, shapes: Sequence[Shape], buckets: np.ndarray):
    super().__init__(source)
    self.shapes, self.buckets = tuple(shapes), buckets
    self._records = source.at_sizes(np.asarray(shapes, np.int32)[buckets])

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index`. Unreadable where it cannot be read."""
    return self._records[index]

  @property
  def order(self) -> str:
    """What the order of batches follows from, in words: sizes with their records, and a checksum.
    """
    counts = np.bincount(self.buckets, minlength=len(self.shapes))
    each = [f'{h}x{w} ({n})' for (h, w), n in zip(self.shapes, counts, strict=True)]
    return f'{", ".join(each)}, checksum {zlib.crc32(self.buckets.astype("<i2").tobytes()):08x}'

  def substitutes(self, index: int) -> Iterator[Sequence]:
    """Yield the records that may take the place of one, of the same kind and size: first those of
    its bucket, then some of all, cut to that size (`spares_of`), then all."""
    yield Some(self._records, group_of(self, index))
    kind, cut = np.asarray(same_kind(self.source, index)), self.cut_to(self.buckets[index])
    yield Some(cut, spares_of(kind))
    yield Some(cut, kind)

  def cut_to(self, bucket: int) -> Any:
    """All records of the source at the size of one bucket."""
    shape = np.asarray(self.shapes[bucket], np.int32)
    return self.source.at_sizes(np.broadcast_to(shape, (len(self), 2)))


def group_of(source: Any, index: int) -> np.ndarray:
  """The numbers of the records of the same kind and bucket as one."""
  kind = np.asarray(same_kind(source, index))
  return kind[source.buckets[kind] == source.buckets[index]]


def spares_of(kind: np.ndarray) -> np.ndarray:
  """The numbers of those of a kind of records that may take the place of any of a bucket in which
  nothing can be read: so few that a cache can have them, too."""
  return kind[spread(len(kind), _SPARES)]


class Some(Sequence):
  """Those records of a source that have these numbers."""

  def __init__(self, source: Sequence, numbers: Sequence[int]):
    self._source, self._numbers = source, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, index: SupportsIndex) -> Any:
    return self._source[int(self._numbers[index])]


def in_buckets(source: Source, shapes: Sequence[Shape]) -> Source:
  """Return the source itself for one size, else its records at the nearest of several, with
  `buckets` and `shapes`; alike in all processes, of which the first reads the sizes.

  UserError: a source whose pictures have but one size.
  """
  if len(shapes) == 1:
    return source
  if not hasattr(source, 'original_sizes'):
    raise UserError(
      f'data.size has {len(shapes)} sizes, but the pictures of this data set have one; give that '
      'alone, or use pictures of your own.'
    )
  found = np.zeros(len(source), np.int32)  # Of a type that every platform can send.

  def read() -> None:
    if jax.process_index() == 0:
      found[:] = assign(source.original_sizes(), shapes)

  in_step('sizes', read, (UserError,), A_DAY)
  found = np.asarray(multihost_utils.broadcast_one_to_all(found))
  return Bucketed(source, shapes, found.astype(np.int16))


@dataclasses.dataclass(frozen=True)
class BySize:
  """The transforms that are made for an image's (height, width)."""

  transforms: Mapping[Shape, Sequence[Callable]]
  random: ClassVar[bool] = True

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    return apply(self.transforms[record['image'].shape[:2]], record, rng)


def buckets_in_words(source: Any, batch_size: int) -> str:
  """Return how many records of a source are in which bucket."""
  counts = np.bincount(source.buckets, minlength=len(source.shapes)).tolist()
  used = [(n, shape) for n, shape in zip(counts, source.shapes, strict=True) if n]
  each = ', '.join(f'{h} x {w}: {n:,}' for n, (h, w) in used)
  few = sum(n < batch_size for n, _ in used)
  rare = f'; of {few} an epoch has less than a batch, which waits for the next' if few else ''
  return f'{len(used)} of {len(source.shapes)} sizes are used ({each}){rare}'
