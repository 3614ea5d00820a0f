"""Whether a CLIP can tell pictures apart at all, measured on real pictures and their captions.

What figures are measured on and with, in sentences: which images, and what the networks that
score were themselves trained on.

Whether a figure may be compared with that of an earlier evaluation in the same table.

One CSV file of many evaluations, a row each, that spreadsheets and pandas read.

What an evaluation leaves: FILE.json, one or more rows of FILE.csv, and a page, FILE.html.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtrc

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures
from diffusion_jax.evaluation.metrics.text import retrieval_hits
from diffusion_jax.evaluation.scores import value_of
from diffusion_jax.files import atomic_write
from diffusion_jax.formats.networks import resolve
from diffusion_jax.runs.trained_on import Pictures, read_trained_on
from diffusion_jax.types import Record
from diffusion_jax.viz.evaluation import figure_columns, write_evaluation_page

PAIRS, CANDIDATES = 256, 100
NEAR = 2
"""Times chance: a CLIP that is not clearly above that is near chance."""
DOUBT = 0.01
"""Probability with which one that is just so good would be taken for better."""


class Retrieval(NamedTuple):
  """Own captions of real pictures that are ranked first: hits of so many pictures, each time among
  so many candidates."""

  hits: int
  count: int
  candidates: int

  @property
  def near_chance(self) -> bool:
    """Whether so many hits come, or more, by more than DOUBT from one of NEAR times chance.

    The hits of the pictures are taken for independent, so that their number is binomial.
    """
    return self._tail(self.hits) > DOUBT

  @property
  def too_few(self) -> bool:
    """Whether not even a perfect CLIP could be told from one near chance."""
    return self._tail(self.count) > DOUBT

  def _tail(self, hits: int) -> float:
    p = min(NEAR / self.candidates, 1.0)
    return 1.0 if hits == 0 or p == 1 else float(bdtrc(hits - 1, self.count, p))

  def told(self, name: str) -> str:
    """A sentence; a warning where it is near chance."""
    found = (
      f'{name} ranks the own caption of {self.count} real pictures first of {self.candidates} for '
      f'{self.hits / self.count:.1%} of them, where chance is {1 / self.candidates:.1%}'
    )
    if self.too_few:
      return f'{found}: these are too few to tell whether figures in its features say anything.'
    if not self.near_chance:
      return f'{found}.'
    return f'{found}: it is near chance, so that figures in its features say next to nothing.'


def real_retrieval(clip: CLIPFeatures, records: Sequence[Record], seed: int = 0) -> Retrieval:
  """Of records, each with its image [h w 3] of one size and its first caption; one at least.

  Of several with one caption, which nothing could tell apart, the first.
  """
  records = list({record['captions'][0]: record for record in records[PAIRS - 1 :: -1]}.values())
  images = clip.images(np.stack([record['image'] for record in records]))
  texts = clip.texts([record['captions'][0] for record in records])
  hits = retrieval_hits(images, texts, k=1, candidates=CANDIDATES, seed=seed)
  return Retrieval(int(hits.sum()), len(records), min(CANDIDATES, len(records)))


REFERENCE, TESTED = 'the reference', 'the test images'

Sets = Mapping[str, Pictures | None]
"""What sets of images are, by what people call them here; None where that is not known."""


def of_features(named: Sequence[str], sets: Sets) -> list[str]:
  """A sentence for each KIND:PATH on what that network was trained on, seen from these sets."""
  return [_of_network(text, _trained_on(text.partition(':')[2]), sets) for text in named]


def of_model(name: str, path: str, sets: Sets) -> str:
  """The same for a model, or for what a training began with."""
  return _of_network(name, _trained_on(path), sets)


def _trained_on(path: str) -> Pictures | None:
  try:
    place = Path(resolve(path))
  except UserError:
    return None
  return read_trained_on(place) if place.is_dir() else None


def _of_network(name: str, trained: Pictures | None, sets: Sets) -> str:
  if trained is None:
    more = f', nor whether {_are(sets)} part of that' if sets else ''
    return f'What {name} was trained on is not known{more}.'
  same = [what for what, pictures in sets.items() if pictures and trained.same(pictures)]
  apart = [what for what, pictures in sets.items() if pictures and trained.apart(pictures)]
  rest = [what for what in sets if what not in (*same, *apart)]
  parts = [f'{_are(same)} these images, which it knows'] if same else []
  parts += [f'{_are(apart)} not among them'] if apart else []
  parts += [f'whether {_are(rest)} among them is not known'] if rest else []
  return f'{name} was trained on {trained.told}' + (f': {"; ".join(parts)}.' if parts else '.')


def _are(sets: Sequence[str] | Mapping) -> str:
  """Their names with a verb."""
  return f'{" and ".join(sets)} {"is" if list(sets) == [REFERENCE] else "are"}'


Row = Mapping[str, Any]
"""COLUMN.FIGURE or settings.NAME -> value, or its text where it was read from a table."""

def incomparable(earlier: Sequence[Row], row: Row) -> list[str]:
  """A sentence for each way in which figures differ from the last ones of their names.

  They may be of other features, resized by another rule, against another reference, or of another
  number of images where that moves the figure by itself.
  """
  found: dict[str, list[str]] = {}
  for figure in sorted(_figures(row)):
    last = next((one for one in reversed(earlier) if figure in _figures(one)), None)
    for reason in () if last is None else _differences(figure, last, row):
      found.setdefault(reason, []).append(figure)
  return [
    f'{", ".join(figures)}: {reason} in the last row with {"it" if len(figures) == 1 else "them"} '
    'of this table; do not compare the two.'
    for reason, figures in found.items()
  ]


def _figures(row: Row) -> set[str]:
  named = (name.partition('.') for name, value in row.items() if value not in (None, ''))
  return {figure for column, _, figure in named if column != 'settings'}


_SAYS = {
  'reference': 'the reference was another',
  'reference_images': 'the reference had another number of images',
  'samples': 'there was another number of samples',
}


def _differences(name: str, last: Row, row: Row) -> Iterator[str]:
  known = value_of(name)
  if known is None:
    return
  value, family = known
  features = [_features(one, family) if family else () for one in (last, row)]
  if all(features) and features[0] != features[1]:
    was, now = (', '.join(sorted(names)) for names in features)
    networks = [{name.rpartition('/')[0] for name in names} for names in features]
    what = 'images were resized by another rule' if networks[0] == networks[1] else (
      'the features were others'
    )
    yield f'{what} ({was}, now {now})'
  for setting, what in _SAYS.items():
    was, now = (str(one.get(f'settings.{setting}') or '') for one in (last, row))
    if setting in value.comparable_on and was and now and was != now:
      yield f'{what} ({was}, now {now})'


def _features(row: Row, family: str) -> set[str]:
  """The names of the row's features of a family."""
  names = re.findall(r"'([^']*)'", str(row.get('settings.features', '')))
  return {name for name in names if name.startswith(f'{family}/')}


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
  """(rows, names of columns), none where there is no file.

  UserError where the file is none of comma-separated values.
  """
  if not path.is_file():
    return [], []
  try:
    with path.open(newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file, strict=True)
      rows, names = list(reader), list(reader.fieldnames or ())
    if any(None in known for known in rows):
      raise ValueError('a row is longer than the first')
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(f'{path} is not a table of evaluations ({error}); move it away.') from error
  return rows, names


def as_read(row: Mapping[str, object]) -> dict[str, str]:
  """A row as it comes back from a table, without what is empty."""
  return {name: str(value) for name, value in row.items() if value not in (None, '')}


def add_rows(path: Path, new: Sequence[Mapping[str, object]]) -> None:
  """Appends rows; columns that are new come last and stay empty in the rows before.

  A row that is there already is left out. UserError as in `read_rows`.
  """
  rows, names = read_rows(path)
  names += [name for row in new for name in row if name not in names]
  names = list(dict.fromkeys(names))
  known = list(map(as_read, rows))
  rows += [row for row in new if as_read(row) not in known]
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, names, restval='')
  writer.writeheader()
  writer.writerows(rows)
  with atomic_write(path) as file:
    file.write(text.getvalue().encode())


def rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Figures as COLUMN.FIGURE, then settings: a row, or, of a sweep, one for each combination."""
  settings = dict(scores.get('settings', {}))
  columns = figure_columns(scores)
  swept = scores.get('sweep', {})
  if not swept:
    return [_row(scores, {name: name for name in columns}, settings)]
  return [
    _row(
      scores, {name: 'generated'} | {c: c for c in columns if c not in swept},
      settings | point['combination'] | {'network_calls': point['network_calls']},
    ) for name, point in swept.items()
  ]


def _row(scores: Mapping[str, Any], names: Mapping[str, str], settings: dict) -> dict[str, Any]:
  figures = {
    f'{name}.{figure}': value for column, name in names.items()
    for figure, value in scores[column].items()
  }
  return figures | {f'settings.{name}': value for name, value in settings.items()}


def _before(table: Path, row: Mapping[str, Any]) -> list[dict[str, str]]:
  """The rows of the table that an evaluation found there, also when it is done again."""
  known = [as_read(one) for one in read_rows(table)[0]]
  return known[: known.index(as_read(row))] if as_read(row) in known else known


def write(
  out: Path, scores: Mapping[str, Any], shown: Mapping[str, Any], say: Callable[[str], None] = print
) -> None:
  """Writes all three; a row that is in the table already is not written again.

  Args:
    shown: what the page shows beside figures, as `viz.evaluation.write_evaluation_page` takes it.
    say: is told of figures that must not be compared with the table's last ones of their names.
  """
  table, new = out.with_suffix('.csv'), rows(scores)
  beware = incomparable(_before(table, new[0]), new[0])
  for text in beware:
    say(f'note: {text}')
  if beware:
    scores = {**scores, 'warnings': [*scores.get('warnings', ()), *beware]}
  add_rows(table, new)
  write_evaluation_page(out.with_suffix('.html'), scores, **shown)
  # Last, for a checkpoint that is in here is not scored again.
  with atomic_write(out) as file:
    file.write((json.dumps(scores, indent=2) + '\n').encode())
