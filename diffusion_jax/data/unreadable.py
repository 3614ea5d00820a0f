"""Records that cannot be read: counted, named once each, and replaced by others."""

import contextlib
import copy
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from diffusion_jax.data.wrapped import Wrapped
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.parallel.processes import post, posted

_MOST_TRIES, _POSTED, _BETWEEN = 1000, 'unreadable', '\n'


class Damage:
  """A sentence on each unreadable record so far, in any source and process of a run.

  say: called from any thread with each new sentence of this process, once.
  """

  def __init__(self, say: Callable[[str], None] = lambda text: None):
    self._say, self._lock = say, threading.Lock()
    self._found: dict[str, str] = {}

  def __len__(self) -> int:
    return len(self._all())

  @property
  def sentences(self) -> list[str]:
    """This process's in order, then those of others."""
    return list(self._all())

  @property
  def causes(self) -> dict[str, int]:
    """How many sentences there are by cause (`errors.Unreadable`), the most frequent first."""
    return dict(Counter(self._all().values()).most_common())

  def _all(self) -> dict[str, str]:
    """Sentence -> cause."""
    with self._lock:
      mine = dict(self._found)
    return mine | dict(text.split(_BETWEEN, 1)[::-1] for text in posted(_POSTED))

  def add(self, sentence: str, cause: str = 'damaged') -> None:
    """Add a sentence, and say it if it is new."""
    with self._lock:
      new = sentence not in self._found
      self._found[sentence] = cause
    if new:
      post(_POSTED, f'{cause}{_BETWEEN}{sentence}')
      self._say(sentence)


class Counted(Wrapped):
  """A source whose unreadable records are counted and not tried again; all else is the source's.

  most: fraction that may be unreadable. name, limit: the records and the source of `most`, in
  errors.
  """

  def __init__(
    self, source: Sequence, most: float, damage: Damage, name: str,
    limit: str = 'data.most_unreadable',
  ):
    super().__init__(source)
    self._most, self._damage, self._name = most, damage, name
    self._limit = limit
    self._found: dict[int, Unreadable] = {}
    self._lock = threading.Lock()

  def __getitem__(self, index: SupportsIndex) -> Any:
    """Return record `index`. Unreadable, or UserError if more than `most` of all cannot be read."""
    index = range(len(self))[index]
    if index in self._found:
      self._check()
      raise Unreadable(str(self._found[index]), self._found[index].cause)
    try:
      return self.source[index]
    except Unreadable as error:
      self._count(index, error)
      raise

  def at_sizes(self, shapes: np.ndarray) -> 'Counted':
    """The source's records at these sizes, counted together with those of here."""
    other = copy.copy(self)
    other.source = self.source.at_sizes(shapes)
    return other

  def uncut(self) -> 'Counted':
    """The source's records uncut, counted together with those of here. UserError: of none."""
    if not hasattr(self.source, 'uncut'):
      raise UserError(
        f'data.crop has no effect on these {self._name}, which have one size; leave it out.'
      )
    other = copy.copy(self)
    other.source = self.source.uncut()
    return other

  def _count(self, index: int, error: Unreadable) -> None:
    self._damage.add(str(error), error.cause)
    with self._lock:
      self._found[index] = error
    self._check()

  def _check(self) -> None:
    with self._lock:
      found = [str(error) for error in self._found.values()]
    if len(found) > self._most * len(self):
      raise UserError(
        f'{len(found)} of {len(self)} {self._name} cannot be read, more than the fraction of '
        f'{self._most:g} that {self._limit} allows: '
        f'{"; ".join(list(dict.fromkeys(found))[:3])}'
      )


def replacement(source: Sequence, index: int, rng: np.random.Generator) -> Any:
  """The readable record that replaces the unreadable `index`.

  It depends on `rng` and the readable records alone, and is of the same kind where a source has
  `kind(index)`, or `substitutes(index)`, which yields sequences of records, the better ones first.
  UserError: none of a thousand records, or of all, can be read.
  """
  if (substitutes := getattr(source, 'substitutes', None)) is None:
    return _one_of(source, same_kind(source, index), rng)
  *better, last = substitutes(index)
  for records in better:
    with contextlib.suppress(NoneReadable):
      return _one_of(records, range(len(records)), rng)
  return _one_of(last, range(len(last)), rng)


def same_kind(source: Sequence, index: int) -> Sequence[int]:
  """The records that may take the place of one: all, unless a source has several kinds of them."""
  return source.kind(index) if hasattr(source, 'kind') else range(len(source))


class NoneReadable(UserError):
  """Of many records in a row none can be read."""


def _one_of(source: Sequence, places: Sequence[int], rng: np.random.Generator) -> Any:
  place, step = int(rng.integers(len(places))), 0
  while math.gcd(step, len(places)) != 1:  # So that the walk comes to all of them, once each.
    step = int(rng.integers(1, len(places) + 1))
  tried, reason = min(len(places), _MOST_TRIES), ''
  for i in range(tried):
    try:
      return source[places[(place + i * step) % len(places)]]
    except Unreadable as error:
      reason = str(error)
  raise NoneReadable(f'{tried} records in a row cannot be read, the last because {reason}')


def readable(source: Sequence, places: Iterable[int] | None = None) -> Iterator[Any]:
  """Yield those records, in order, that can be read; of all, or at the places."""
  for place in range(len(source)) if places is None else places:
    try:
      record = source[int(place)]
    except Unreadable:
      continue
    yield record


def about(source: Sequence, index: int) -> Any:
  """Record `index`, without its picture where the source has `about` for that. Unreadable."""
  return (getattr(source, 'about', None) or source.__getitem__)(index)


def captions_of(source: Sequence, places: Iterable[int] | None = None) -> Iterator[list[str]]:
  """Yield the captions of records that have any, in order; no picture is opened if a source can do
  without. places: as of `readable`."""
  for place in range(len(source)) if places is None else places:
    with contextlib.suppress(Unreadable):
      yield about(source, int(place))['captions']


def first_readable(source: Sequence, count: int, places: Iterable[int] | None = None) -> list[Any]:
  """The first `count` readable records, or fewer if there are no more; UserError for none."""
  found = list(itertools.islice(readable(source, places), count))
  if not found:
    raise UserError(
      f'none of {len(source)} test records can be read; choose another data set.' if len(source)
      else 'the test split is empty; choose another data set.'
    )
  return found
