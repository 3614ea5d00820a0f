"""What an evaluation says: on what it was measured, what to beware of, and its files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import bdtrc

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures, text_towers
from diffusion_jax.evaluation.images import ImageSet, Split, shuffled
from diffusion_jax.evaluation.metrics.text import retrieval_hits
from diffusion_jax.evaluation.scores import value_of
from diffusion_jax.files import atomic_write
from diffusion_jax.formats.networks import resolve
from diffusion_jax.runs.trained_on import DataSplit, read_trained_on
from diffusion_jax.types import Record

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Comparison

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

Sets = Mapping[str, DataSplit | None]
"""What sets of images are, by what people call them here; None where that is not known."""


def of_features(named: Sequence[str], sets: Sets) -> list[str]:
  """A sentence for each KIND:PATH on what that network was trained on, seen from these sets."""
  return [_of_network(text, _trained_on(text.partition(':')[2]), sets) for text in named]


def of_model(name: str, path: str, sets: Sets) -> str:
  """The same for a model, or for what a training began with."""
  return _of_network(name, _trained_on(path), sets)


def _trained_on(path: str) -> DataSplit | None:
  try:
    place = Path(resolve(path))
  except UserError:
    return None
  return read_trained_on(place) if place.is_dir() else None


def _of_network(name: str, trained: DataSplit | None, sets: Sets) -> str:
  if trained is None:
    more = f', nor whether {_are(sets)} part of that' if sets else ''
    return f'What {name} was trained on is not known{more}.'
  same = [what for what, pictures in sets.items() if pictures and trained.same(pictures)]
  apart = [what for what, pictures in sets.items() if pictures and trained.apart(pictures)]
  rest = [what for what in sets if what not in (*same, *apart)]
  parts = [f'{_are(same)} these images, which it knows'] if same else []
  parts += [f'{_are(apart)} not among them'] if apart else []
  parts += [f'whether {_are(rest)} among them is not known'] if rest else []
  return f'{name} was trained on {trained.described}' + (f': {"; ".join(parts)}.' if parts else '.')


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


BESIDE = ('intervals', 'measured', 'warnings', 'settings', 'sweep', 'history')
"""Entries of scores that are no columns."""


def columns_of(scores: Mapping[str, Any]) -> list[str]:
  """Return the columns of values among what an evaluation has written."""
  return [name for name in scores if name not in BESIDE]


def rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Figures as COLUMN.FIGURE, then settings: a row, or, of a sweep, one for each combination."""
  settings = dict(scores.get('settings', {}))
  columns = columns_of(scores)
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


def measured_and_warnings(
  comparison: Comparison, images: int, about: Sequence[str], tested: Split | None
) -> tuple[list[str], list[str]]:
  """Return (sentences on what scores were measured on, what to beware of).

  Args:
    images: that were scored. about: what these are.
    tested: the test split, where they are of it: real pictures with captions.
  """
  reference = comparison.reference
  sets = {REFERENCE: _pictures(reference.images)} if reference.count else {}
  sets |= {TESTED: tested.pictures} if tested else {}
  against = f', against {reference.name}' if reference.count else ''
  count = f' ({reference.count:,} images)' if reference.count else ''
  measured, warnings = [f'Of {images:,} images{against}{count}.', *about], []
  measured += of_features(comparison.named, sets)
  measured += [
    f'{one.name} sees them at {one.size} px, enlarged from {tested.pictures.size}.'
    for one in comparison.extraction.extractors if tested and one.size > tested.pictures.size
  ]
  if comparison.checked is None:
    comparison.checked = _checked(comparison, tested or reference.images)
  for text, beware in comparison.checked:
    (warnings if beware else measured).append(text)
  return measured, warnings


def _pictures(images: ImageSet | None):
  while hasattr(images, 'images'):  # Some of a set.
    images = images.images
  return getattr(images, 'pictures', None)


def _checked(comparison: Comparison, real: ImageSet | None) -> list[tuple[str, bool]]:
  """What each CLIP makes of real pictures and their captions: (sentence, whether to beware)."""
  clips = text_towers(
    comparison.named, comparison.extraction.extractors, comparison.extraction.mesh
  )
  records = getattr(real, 'records', None)
  if not records:
    return [(
      f'Whether {clip.extractor.name} knows captions of such pictures was not tried: there are no '
      'real ones with captions.', False,
    ) for clip in clips.values()]
  chosen = shuffled(records, min(PAIRS, len(records)))
  found = {clip.extractor.name: real_retrieval(clip, chosen) for clip in clips.values()}
  return [(one.told(name), one.near_chance) for name, one in found.items()]


def write(
  out: Path, scores: Mapping[str, Any], page: Callable[[Path, Mapping[str, Any]], None],
  say: Callable[[str], None] = print,
) -> None:
  """Write a row of FILE.csv, the page and the JSON; a row that is there already stays alone.

  Args:
    page: writes the page of the scores.
    say: is told of values that must not be compared with the table's last ones of their names.
  """
  table, new = out.with_suffix('.csv'), rows(scores)
  beware = incomparable(_before(table, new[0]), new[0])
  for text in beware:
    say(f'note: {text}')
  if beware:
    scores = {**scores, 'warnings': [*scores.get('warnings', ()), *beware]}
  add_rows(table, new)
  page(out.with_suffix('.html'), scores)
  # Last, for a checkpoint that is in here is not scored again.
  with atomic_write(out) as file:
    file.write((json.dumps(scores, indent=2) + '\n').encode())
