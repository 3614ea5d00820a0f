"""What is known of a set that has been written: numbers of the card, and duplicates."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.perceptual import EDGE, pairs_alike
from diffusion_jax.data.prepare.shard import Job

MOST_NAMED = 200
"""Pictures that cannot be read, and pairs that look the same, of which a card says more than the
number."""


class Notes(NamedTuple):
  """Notes on the records of a split; rows: of `shard.NOTE`, one array a shard, mapped; texts: of
  each shard's JSON."""

  rows: list[np.ndarray]
  texts: list[dict[str, Any]]

  def column(self, name: str) -> np.ndarray:
    """One field of all records."""
    return np.concatenate([rows[name] for rows in self.rows])

  def labels(self, names: Sequence[str]) -> list[np.ndarray]:
    """The places of labels among `names`, int32, one array a shard; -1 for none."""
    places = {name: place for place, name in enumerate(names)}
    own = ([*(places[label] for label in text['labels']), -1] for text in self.texts)
    return [
      np.asarray(table, np.int32)[rows['label']] for table, rows in zip(own, self.rows, strict=True)
    ]


def read_notes(jobs: Sequence[Job]) -> Notes:
  """The notes of whole shards."""
  return Notes(
    [np.load(job.notes.with_suffix('.npy'), mmap_mode='r', allow_pickle=False) for job in jobs],
    [json.loads(job.notes.with_suffix('.json').read_bytes()) for job in jobs],
  )


class Duplicates(NamedTuple):
  """Records are numbered over all splits in order.

  repeats: those whose picture has come before, byte for byte, by split. alike: those of a split
  that look like an earlier one of it without being the same bytes. across: records of the test
  split whose picture, or one that looks like it, is trained on; exact: of them, byte for byte.
  pairs: int64 [m 2], the lower number first, of those that look the same, across splits first.
  """

  repeats: Mapping[str, int]
  alike: Mapping[str, int]
  across: int
  exact: int
  pairs: np.ndarray


def find_duplicates(splits: Mapping[str, Notes]) -> Duplicates:
  """Duplicates within and across splits, byte for byte and by their looks."""
  names, parts = list(splits), list(splits.values())
  counts = [sum(map(len, notes.rows)) for notes in parts]
  split = np.repeat(np.arange(len(parts)), counts)
  content = np.concatenate([notes.column('content') for notes in parts])
  hashes = np.concatenate([notes.column('hash') for notes in parts])
  keys = np.ascontiguousarray(content).view([('', '<u8')] * 2)[:, 0]
  _, first, group = np.unique(keys, return_index=True, return_inverse=True)
  rows = [rows for notes in parts for rows in notes.rows]
  alone = np.sort(first)  # Copies byte for byte would only fill the windows.
  found = alone[pairs_alike(hashes[alone], lambda places: _copies(rows, alone[places]))]
  within = found[split[found[:, 0]] == split[found[:, 1]]]
  between = found[split[found[:, 0]] != split[found[:, 1]]]
  repeats, alike = {}, {}
  for number, name in enumerate(names):
    own = group[split == number]
    repeats[name] = len(own) - len(np.unique(own))
    alike[name] = len(np.unique(within[split[within[:, 1]] == number][:, 1]))
  across, exact = _across(split, group, found)
  return Duplicates(repeats, alike, across, exact, np.concatenate([between, within]))


def _across(split: np.ndarray, group: np.ndarray, pairs: np.ndarray) -> tuple[int, int]:
  """Records of split 1 whose picture is in split 0, too: by looks or bytes, and by bytes alone."""
  same = np.isin(group, group[split == 0]) & (split == 1)
  # Groups of equal bytes stand for one another, whichever of them was compared.
  trained = np.unique(group[split == 0])
  a, b = group[pairs[:, 0]], group[pairs[:, 1]]
  like_trained = np.concatenate([b[np.isin(a, trained)], a[np.isin(b, trained)]])
  either = same | (np.isin(group, like_trained) & (split == 1))
  return int(either.sum()), int(same.sum())


def _copies(rows: Sequence[np.ndarray], numbers: np.ndarray) -> np.ndarray:
  """Small copies of those records; only they are read."""
  ends = np.cumsum([len(each) for each in rows])
  shards = np.searchsorted(ends, numbers, side='right')
  found = np.empty((len(numbers), EDGE, EDGE, 3), np.uint8)
  for shard in np.unique(shards):
    mine = shards == shard
    first = ends[shard] - len(rows[shard])
    found[mine] = rows[shard]['copy'][numbers[mine] - first]
  return found


@dataclasses.dataclass(frozen=True)
class SplitSummary:
  """One split. bytes: of all pictures. sizes: (height, width), int32 [n 2]. captions: number of
  each record's captions. characters: of each record's first caption. labels: records by class."""

  records: int
  shards: int
  bytes: int
  sizes: np.ndarray
  captions: np.ndarray
  characters: np.ndarray
  labels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Summary:
  """A set that has been written.

  bad: [cause, sentence, name] of the first that could not be read. words: the most frequent in
  captions. samples: [name, caption]. measured: what scores are measured on. notes: what of the
  source is not used.
  """

  folder: Path
  source: str
  command: str
  splits: dict[str, SplitSummary]
  causes: dict[str, int]
  bad: list[list[str]]
  words: dict[str, int]
  samples: list[list[str]]
  duplicates: Duplicates
  measured: str
  notes: list[str]
  credit: str
  kept: dict[str, Any]
  fingerprints: dict[str, Any]

  @property
  def records(self) -> int:
    """Of all splits."""
    return sum(split.records for split in self.splits.values())

  @property
  def warnings(self) -> list[str]:
    """What scores on this set must be read with."""
    found, test = self.duplicates, self.splits.get('test')
    if not (test and found.across):
      return []
    return [
      f'Of {test.records:,} test pictures {found.across:,} are trained on, or look like one that '
      f'is ({found.exact:,} byte for byte).'
    ]


def summed(notes: Notes, rows: Sequence[np.ndarray], names: Sequence[str]) -> SplitSummary:
  """A split's numbers; rows: of its shards, of `records.ROW`."""
  labels = np.concatenate(notes.labels(names))
  counts = np.bincount(labels[labels >= 0], minlength=len(names))
  return SplitSummary(
    sum(map(len, rows)), len(rows), int(notes.column('bytes').sum()),
    np.concatenate([each['size'] for each in rows]), notes.column('captions'),
    notes.column('characters'),
    {name: int(count) for name, count in zip(names, counts, strict=True) if count},
  )


def texts_of(splits: Mapping[str, Notes], words: int, samples: int) -> dict[str, Any]:
  """`Summary`'s causes, bad, words and samples, of so many."""
  texts = [text for notes in splits.values() for text in notes.texts]
  bad = [one for text in texts for one in text['bad']]
  counted: Counter = Counter()
  for text in texts:
    counted.update(text['words'])
  frequent = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:words]
  shown = [sample for text in texts for sample in text['samples']]
  step = max(1, len(shown) // samples)
  return {
    'causes': dict(Counter(cause for cause, *_ in bad).most_common()), 'bad': bad[:MOST_NAMED],
    'words': dict(frequent), 'samples': shown[::step][:samples],
  }
