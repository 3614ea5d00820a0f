"""Several sources as one, each as often as it is given.

The records of a mixture are those of its parts, one part after another, each once: so sizes,
buckets, caches and fingerprints are as of any source. How often they are read is the order's: an
epoch goes over each part a whole number of times, shuffled anew each time, so that within a part
none comes twice before all have come. Example q of the n that a part has in an epoch stands at the
time (q + 1/2) / n, those of all parts by time, and the earlier part first: every batch has the
parts in proportion, to within one example each. Which record stands where follows from seed, place
and the parts' names alone.
"""

import contextlib
import functools
import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, SupportsIndex

import grain
import numpy as np

from diffusion_jax.data.order import Shuffled
from diffusion_jax.data.sources.entries import DIGEST
from diffusion_jax.data.splits import APART, Measured, fingerprint, measured_on, of_names
from diffusion_jax.data.transforms import SIZES, apply, whole
from diffusion_jax.data.unreadable import about
from diffusion_jax.data.wrapped import Wrapped
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.mixture import PartConfig, Passes, passes_of

_BLOCK = 4096
"""Places whose records are found together."""
_BLOCKS = 32
"""Blocks that are kept."""
_FEW = 4096
"""Records of a part whose passes are shuffled by drawing a number for each."""
_SHARED = ('original_sizes', 'hashes', 'at_sizes', 'uncut')
OWN = 'caption_dropout'
"""The field of a record with its part's rate of caption dropout, float32; -1 for the task's."""


class Mixed:
  """How often the records of each part are read, and what they have of it."""

  def __init__(self, parts: Mapping[str, PartConfig], counts: Sequence[int]):
    self.parts = dict(parts)
    self.passes: Passes = passes_of(list(parts.values()), counts)
    self._names = list(parts)
    self._firsts = np.concatenate([[0], np.cumsum(self.passes.counts)])
    self._starts = np.concatenate([[0], np.cumsum(self.passes.counts * self.passes.passes)])
    rates = [part.caption_dropout for part in parts.values()]
    self.drops = any(rate is not None for rate in rates)
    self._rates = [np.float32(-1 if rate is None else rate) for rate in rates]

  def __len__(self) -> int:
    """Examples of an epoch."""
    return int(self._starts[-1])

  @property
  def text(self) -> str:
    """The parts with their shares, in words."""
    return ', '.join(
      f'{name} {share:.1%} ({count:,} records, {passes} times an epoch)'
      for name, share, count, passes in zip(
        self._names, self.passes.shares, self.passes.counts, self.passes.passes, strict=True
      )
    )

  def parts_of(self, records: np.ndarray) -> np.ndarray:
    """The numbers of the parts that records are of."""
    return np.searchsorted(self._firsts, records, side='right') - 1

  def fields(self, record: int) -> dict[str, Any]:
    """What a record has of its part: its name, and its rate of caption dropout if any has one."""
    part = int(self.parts_of(record))
    own = {OWN: self._rates[part]} if self.drops else {}
    return {'part': self._names[part], **own}

  def records(self, slots: np.ndarray) -> np.ndarray:
    """The records of slots: those of an epoch, part by part, pass by pass."""
    part = np.searchsorted(self._starts, slots, side='right') - 1
    return self._firsts[part] + (slots - self._starts[part]) % self.passes.counts[part]

  def stream(self, seed: int, shuffle: bool) -> grain.MapDataset:
    """The numbers of the records as they are read, epoch after epoch."""
    return _Stream(grain.MapDataset.source(range(len(self))).seed(seed), self, seed, shuffle)

  def order(self, seed: int, shuffle: bool) -> 'Interleaved':
    """The order of the slots."""
    seeds = [seed ^ zlib.crc32(name.encode()) for name in self._names]
    return Interleaved(self.passes, seeds if shuffle else None)


class Few:
  """As `order.Shuffled`, of so few records that an epoch has many passes over them."""

  def __init__(self, count: int, seed: int):
    self._order = functools.lru_cache(8)(
      lambda epoch: np.random.default_rng([seed, epoch]).random(count).argsort(kind='stable')
    )

  def __call__(self, records: np.ndarray, epoch: int) -> np.ndarray:
    return self._order(epoch).argsort()[records]

  def records(self, places: np.ndarray, epoch: int) -> np.ndarray:
    """Return the records that stand at places of an epoch."""
    return self._order(epoch)[places]


class Interleaved:
  """The order of a mixture's slots; called, the places of slots, as of `order.Shuffled`.

  seeds: of each part; None to keep the order of its records.
  """

  def __init__(self, passes: Passes, seeds: Sequence[int] | None):
    self._counts, self._passes = passes
    self._totals = self._counts * self._passes
    self._starts = np.concatenate([[0], np.cumsum(self._totals)])
    self._shuffled = None if seeds is None else [
      (Few if count <= _FEW else Shuffled)(int(count), seed)
      for count, seed in zip(self._counts, seeds, strict=True)
    ]
    self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
    self._lock = threading.Lock()

  def __call__(self, slots: np.ndarray, epoch: int) -> np.ndarray:
    places = np.empty(len(slots), np.int64)
    parts = np.searchsorted(self._starts, slots, side='right') - 1
    for part in np.unique(parts):
      mine = parts == part
      passing, record = np.divmod(slots[mine] - self._starts[part], self._counts[part])
      within = record if self._shuffled is None else self._each_pass(
        self._shuffled[part], part, record, passing, epoch
      )
      places[mine] = self._places(part, passing * self._counts[part] + within)
    return places

  def records(self, places: np.ndarray, epoch: int) -> np.ndarray:
    """The slots that stand at places [m] of an epoch."""
    found = np.empty(len(places), np.int64)
    blocks = places // _BLOCK
    for block in np.unique(blocks):
      mine = blocks == block
      found[mine] = self._block(epoch, int(block))[places[mine] % _BLOCK]
    return found

  def _block(self, epoch: int, block: int) -> np.ndarray:
    """The slots at the places from block * _BLOCK on, int64 [_BLOCK or less]."""
    with self._lock:
      if (epoch, block) not in self._blocks:
        self._blocks[epoch, block] = self._made(epoch, block)
        while len(self._blocks) > _BLOCKS:
          self._blocks.popitem(last=False)
      return self._blocks[epoch, block]

  def _made(self, epoch: int, block: int) -> np.ndarray:
    whole = int(self._starts[-1])
    first, stop = block * _BLOCK, min((block + 1) * _BLOCK, whole)
    slots = np.empty(stop - first, np.int64)
    for part, (count, total) in enumerate(zip(self._counts, self._totals, strict=True)):
      # A place is off its time by one for each part at most.
      around = (len(self._counts) + 2) * int(total) // whole + 2
      low = max(first * int(total) // whole - around, 0)
      examples = np.arange(low, min(stop * int(total) // whole + around, int(total)))
      places = self._places(part, examples)
      here = (places >= first) & (places < stop)
      passing, within = np.divmod(examples[here], count)
      if self._shuffled is not None:
        within = self._each_pass(self._shuffled[part].records, part, within, passing, epoch)
      slots[places[here] - first] = self._starts[part] + passing * count + within
    return slots

  def _each_pass(
    self, shuffled: Callable, part: int, numbers: np.ndarray, passing: np.ndarray, epoch: int
  ) -> np.ndarray:
    """The numbers in the order of their passes, which go on from epoch to epoch."""
    found = np.empty_like(numbers)
    by_pass = passing.argsort(kind='stable')
    each, firsts = np.unique(passing[by_pass], return_index=True)
    for number, mine in zip(each.tolist(), np.split(by_pass, firsts[1:]), strict=True):
      found[mine] = shuffled(numbers[mine], epoch * int(self._passes[part]) + number)
    return found

  def _places(self, part: int, examples: np.ndarray) -> np.ndarray:
    """Where examples of a part stand: after those of its own before them, and of others by time."""
    total = int(self._totals[part])
    places = examples.copy()
    for other, many in enumerate(self._totals.tolist()):
      if other == part:
        continue
      # Those of its q with (2 q + 1) / (2 many) < (2 example + 1) / (2 total), or = if it is first.
      ahead = (2 * examples + 1) * many - total
      places += np.clip(
        ahead // (2 * total) + 1 if other < part else -(-ahead // (2 * total)), 0, many
      )
    return places


class _Stream(grain.MapDataset):
  """Of a parent as long as an epoch."""

  def __init__(self, parent: grain.MapDataset, mixed: Mixed, seed: int, shuffle: bool):
    super().__init__(parent)
    self._mixed, self._order = mixed, mixed.order(seed, shuffle)

  def __len__(self) -> int:
    return len(self._mixed)

  def __getitem__(self, index: int) -> int:
    epoch, place = divmod(index, len(self))
    return int(self._mixed.records(self._order.records(np.array([place]), epoch))[0])


class Mixture(Sequence):
  """The records of several sources, one after another; where to read which is `mixed`.

  Where some of them tell the sizes of what their images were cut from, others' images are whole.

  parts: the sources by name. configs: what they are like, for training; None for all records once,
  spread among each other.
  """

  def __init__(
    self, parts: Mapping[str, Any], configs: Mapping[str, PartConfig] | None = None
  ):
    for name, part in parts.items():
      if not len(part):
        raise UserError(f'data.mixture.{name} has no records; leave it out.')
    self.parts = dict(parts)
    counts = [len(part) for part in parts.values()]
    self._firsts = np.concatenate([[0], np.cumsum(counts)])
    self._numbers = None
    if configs is None:
      once = Passes(np.asarray(counts), np.ones(len(counts), np.int64))
      self._numbers = Interleaved(once, None).records(np.arange(sum(counts)), 0)
    else:
      self.mixed = Mixed(configs, counts)
    self._tells = any(hasattr(part, 'original_sizes') for part in parts.values())
    measured = {name: measured_on(part) for name, part in parts.items()}
    self.measured = APART if {*measured.values()} == {APART} else Measured(
      ' '.join(f'{name}: {each.sentence}' for name, each in measured.items()),
      any(each.trained_on for each in measured.values()),
    )

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def _place(self, index: SupportsIndex) -> tuple[Any, int]:
    """The source of a record, and its number there."""
    index = range(len(self))[index]
    index = index if self._numbers is None else int(self._numbers[index])
    part = int(np.searchsorted(self._firsts, index, side='right')) - 1
    return list(self.parts.values())[part], index - int(self._firsts[part])

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index`. Unreadable where it cannot be read."""
    source, number = self._place(index)
    record = source[number]
    if self._tells and SIZES not in record and 'image' in record:
      record = record | {SIZES: whole(record['image'])}
    return record

  def about(self, index: SupportsIndex) -> dict[str, Any]:
    """A record, perhaps without its picture. Unreadable."""
    source, number = self._place(index)
    return about(source, number)

  def kind(self, index: int) -> Sequence[int]:
    """The records of the part that one is of, which may take its place."""
    part = self._place(index)[0]
    number = next(i for i, source in enumerate(self.parts.values()) if source is part)
    first, stop = self._firsts[number : number + 2]
    if self._numbers is None:
      return range(int(first), int(stop))
    return np.flatnonzero((self._numbers >= first) & (self._numbers < stop)).tolist()

  def __getattr__(self, name: str) -> Any:
    """What all parts have of `original_sizes`, `at_sizes` and `uncut`, as of a `PictureSource`, and
    `hashes` where one has them."""
    enough = any if name == 'hashes' else all
    if name not in _SHARED or not enough(hasattr(part, name) for part in self.parts.values()):
      raise AttributeError(name)
    return getattr(self, f'_{name}')

  def _original_sizes(self) -> np.ndarray:
    rows = np.concatenate([source.original_sizes() for source in self.parts.values()])
    return rows if self._numbers is None else rows[self._numbers]

  def _hashes(self, records: np.ndarray | None = None) -> np.ndarray:
    records = np.arange(len(self)) if records is None else records
    records = records if self._numbers is None else self._numbers[records]
    found = np.empty((len(records), DIGEST), np.uint8)
    ends = zip(self.parts.values(), self._firsts, self._firsts[1:], strict=False)
    for source, first, stop in ends:
      mine = (records >= first) & (records < stop)
      found[mine] = _hashes(source, records[mine] - first)
    return found

  def _at_sizes(self, shapes: np.ndarray) -> 'Mixture':
    if self._numbers is not None:
      places = np.argsort(self._numbers)
      shapes = shapes[places]
    ends = zip(self.parts.items(), self._firsts, self._firsts[1:], strict=False)
    return self.replaced({
      name: source.at_sizes(shapes[first:stop]) for (name, source), first, stop in ends
    })

  def _uncut(self) -> 'Mixture':
    return self.replaced({name: source.uncut() for name, source in self.parts.items()})

  def replaced(self, parts: Mapping[str, Any]) -> 'Mixture':
    """The mixture with other sources of as many records in the place of its parts."""
    return Mixture(parts, self.mixed.parts if self._numbers is None else None)

  def counted(self, counted: Callable, name: str) -> 'Mixture':
    """The mixture with the unreadable records of each part counted; counted: of (source, name)."""
    return self.replaced({
      part: counted(source, name=f'{name} of {part}') for part, source in self.parts.items()
    })

  def fingerprint(self) -> dict[str, str]:
    """Hashes that change with any part's, and its name."""
    found: dict[str, list[str]] = {}
    for name, source in self.parts.items():
      for what, value in fingerprint(source).items():
        found.setdefault(what, []).append(f'{name}:{value}')
    return {what: of_names(values, []) for what, values in found.items()}

  @property
  def labels(self) -> list[str] | None:
    """The labels of all records that have one, part by part; None without."""
    found = [getattr(source, 'labels', None) for source in self.parts.values()]
    return [each for labels in found for each in labels or ()] if any(found) else None

  @property
  def notes(self) -> tuple[str, ...]:
    """The shares, and the notes of the parts, sentences."""
    own = (f'the mixture: {self.mixed.text}.',) if self._numbers is None else ()
    return (*own, *(
      f'{name}: {note}' for name, source in self.parts.items()
      for note in getattr(source, 'notes', ())
    ))

  @property
  def credit(self) -> str:
    """Whom to thank, for all parts."""
    found = (getattr(source, 'credit', '') for source in self.parts.values())
    return ' '.join(dict.fromkeys(filter(None, found)))


def _hashes(source: Any, records: np.ndarray) -> np.ndarray:
  """Digests of pictures, uint8 [m DIGEST]: as the source knows them, or of all pixels."""
  if hasattr(source, 'hashes'):
    return source.hashes(records)
  found = np.zeros((len(records), DIGEST), np.uint8)
  for row, record in zip(found, records.tolist(), strict=True):
    with contextlib.suppress(Unreadable):  # It is named when it is read to be trained on.
      image = source[record]['image']
      pixels = f'{image.shape}\n'.encode() + image.tobytes()
      row[:] = np.frombuffer(hashlib.sha256(pixels).digest()[:DIGEST], np.uint8)
  return found


class Worded(Wrapped):
  """A source whose captions have a prefix and a suffix; all else is the source's."""

  def __init__(self, source: Any, prefix: str, suffix: str):
    super().__init__(source)
    self._prefix, self._suffix = prefix, suffix

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index`. Unreadable where it cannot be read."""
    return self._worded(self.source[index])

  def about(self, index: SupportsIndex) -> dict[str, Any]:
    """A record, perhaps without its picture. Unreadable."""
    return self._worded(about(self.source, index))

  def at_sizes(self, shapes: np.ndarray) -> 'Worded':
    """The source's records at these sizes."""
    return Worded(self.source.at_sizes(shapes), self._prefix, self._suffix)

  def uncut(self) -> 'Worded':
    """The source's records uncut."""
    return Worded(self.source.uncut(), self._prefix, self._suffix)

  def fingerprint(self) -> dict[str, str]:
    """Hashes that change with the words, too."""
    found = fingerprint(self.source)
    words = [self._prefix, self._suffix, found.get('captions', '')]
    return found | {'captions': of_names(words, [])}

  def _worded(self, record: dict[str, Any]) -> dict[str, Any]:
    if 'captions' not in record:
      return record
    return record | {
      'captions': [f'{self._prefix}{text}{self._suffix}' for text in record['captions']]
    }


class ByPart:
  """The transforms of the part that a record is of."""

  random: ClassVar[bool] = True

  def __init__(self, transforms: Mapping[str, Sequence[Callable]]):
    self.transforms = transforms

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    return apply(self.transforms[record['part']], record, rng)
