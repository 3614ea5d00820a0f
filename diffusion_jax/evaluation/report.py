"""Scores with sentences on what they were measured on, warnings, and the files of both."""

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
from diffusion_jax.evaluation.evaluator import BESIDE
from diffusion_jax.evaluation.extractors.clip import CLIPFeatures
from diffusion_jax.evaluation.images import ImageSet, Split, shuffled
from diffusion_jax.evaluation.metrics.images import retrieval_hits
from diffusion_jax.evaluation.metrics.metric import value_of
from diffusion_jax.files import atomic_write
from diffusion_jax.formats.networks import resolve
from diffusion_jax.runs.trained_on import DataSplit, read_trained_on
from diffusion_jax.types import Record

if TYPE_CHECKING:
  from diffusion_jax.evaluation.comparison import Comparison, Found

PAIRS, CANDIDATES = 256, 100
NEAR = 2
"""Times chance: a CLIP that is not clearly above that is near chance."""
DOUBT = 0.01
"""Probability with which one that is just so good would be taken for better."""


class Retrieval(NamedTuple):
  """Hits of real images, whose own caption is ranked first among so many candidates."""

  hits: int
  count: int
  candidates: int

  @property
  def near_chance(self) -> bool:
    """True if a CLIP of NEAR times chance has so many hits, binomial, at a probability > DOUBT."""
    return self._tail(self.hits) > DOUBT

  @property
  def too_few(self) -> bool:
    """Not even a perfect CLIP could be distinguished from one near chance."""
    return self._tail(self.count) > DOUBT

  def _tail(self, hits: int) -> float:
    p = min(NEAR / self.candidates, 1.0)
    return 1.0 if hits == 0 or p == 1 else float(bdtrc(hits - 1, self.count, p))

  def sentence(self, name: str) -> str:
    """Return a sentence; a warning where it is near chance."""
    found = (
      f'{name} ranks the own caption of {self.count} real pictures first of {self.candidates} for '
      f'{self.hits / self.count:.1%} of them, where chance is {1 / self.candidates:.1%}'
    )
    if self.too_few:
      return f'{found}: these are too few to know whether values in its features say anything.'
    if not self.near_chance:
      return f'{found}.'
    return f'{found}: it is near chance, so that values in its features say next to nothing.'


def real_retrieval(clip: CLIPFeatures, records: Sequence[Record], seed: int = 0) -> Retrieval:
  """Test a CLIP on one record or more, images [h w 3] of one size, by distinct first captions."""
  records = list({record['captions'][0]: record for record in records[PAIRS - 1 :: -1]}.values())
  images = clip.images(np.stack([record['image'] for record in records]))
  texts = clip.texts([record['captions'][0] for record in records])
  hits = retrieval_hits(images, texts, k=1, candidates=CANDIDATES, seed=seed)
  return Retrieval(int(hits.sum()), len(records), min(CANDIDATES, len(records)))


REFERENCE, TESTED = 'the reference', 'the test images'

Sets = Mapping[str, DataSplit | None]
"""Sets of images by what people call them here; None where they are not known."""


def of_features(named: Sequence[str], sets: Sets) -> list[str]:
  """Return a sentence for each KIND:PATH on what that network was trained on, and these sets."""
  return [_of_network(text, _trained_on(text.partition(':')[2]), sets) for text in named]


def of_model(name: str, path: str, sets: Sets) -> str:
  """Return the same for a model, or for what a training began with."""
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
  more = f': {"; ".join(parts)}' if parts else ''
  return f'{name} was trained on {trained.described}{more}.'


def _are(sets: Sequence[str] | Mapping) -> str:
  """Their names with a verb."""
  return f'{" and ".join(sets)} {"is" if list(sets) == [REFERENCE] else "are"}'


Row = Mapping[str, Any]
"""COLUMN.METRIC or settings.NAME -> value, or its text where it was read from a table."""


def incomparable(earlier: Sequence[Row], row: Row) -> list[str]:
  """A sentence for each reason why values do not compare with the last of their names.

  Such as other features, resize rule or reference, or another number of images where that matters.
  """
  found: dict[str, list[str]] = {}
  for metric in sorted(_metrics(row)):
    last = next((one for one in reversed(earlier) if metric in _metrics(one)), None)
    for reason in () if last is None else differences(metric, last, row):
      found.setdefault(reason, []).append(metric)
  return [
    f'{", ".join(metrics)}: {reason} in the last row with {"it" if len(metrics) == 1 else "them"} '
    'of this table; do not compare the two.'
    for reason, metrics in found.items()
  ]


def _metrics(row: Row) -> set[str]:
  named = (name.partition('.') for name, value in row.items() if value not in (None, ''))
  return {metric for column, _, metric in named if column != 'settings'}


_SAYS = {
  'reference': 'the reference was another',
  'reference_images': 'the reference had another number of images',
  'samples': 'there was another number of samples',
}


def differences(name: str, last: Row, row: Row) -> Iterator[str]:
  """Yield why values of a metric in two rows say more than how good the models are."""
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
  names = re.findall(r"'([^']*)'", str(row.get('settings.features', '')))
  return {name for name in names if name.startswith(f'{family}/')}


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
  """(rows, column names) of comma-separated values, none without a file; or UserError."""
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
  """Return a row as it comes back from a table, without what is empty."""
  return {name: str(value) for name, value in row.items() if value not in (None, '')}


def add_rows(path: Path, new: Sequence[Mapping[str, object]]) -> None:
  """Append rows that are not there yet; new columns come last, empty before; or UserError."""
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


def columns_of(scores: Mapping[str, Any]) -> list[str]:
  """Return the columns of values among what an evaluation has written."""
  return [name for name in scores if name not in BESIDE]


def rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Return values as COLUMN.METRIC, then settings: a row, of a sweep one for each combination."""
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
  values = {
    f'{name}.{metric}': value for column, name in names.items()
    for metric, value in scores[column].items()
  }
  return values | {f'settings.{name}': value for name, value in settings.items()}


def _before(table: Path, row: Mapping[str, Any]) -> list[dict[str, str]]:
  """Return the rows that an evaluation found in the table, also when it is done again."""
  known = [as_read(one) for one in read_rows(table)[0]]
  return known[: known.index(as_read(row))] if as_read(row) in known else known


def report(
  comparison: Comparison, found: Found, settings: Mapping[str, Any], about: Sequence[str] = (),
  tested: Split | None = None, say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Columns of values, and, of the first, 'intervals', 'warnings', 'measured', 'settings'.

  settings: all else that decides the values. about: sentences on the images. tested: the test split
  if they are of it. say: is given warnings that the comparison does not know.
  """
  features, plan = found.features, found.columns[found.first].work.plan
  measured, warnings = _measured_and_warnings(comparison, len(features.rows), about, tested)
  for text in warnings:
    say(f'note: {text}')
  one = found.scores[found.first]
  return {
    **found.values,
    'intervals': {name: interval._asdict() for name, interval in one.intervals.items()},
    'warnings': [*warnings, *one.warnings], 'measured': measured,
    'settings': {
      'samples': len(features.rows), 'unreadable': len(features.errors),
      **{name: plan[name] for name in ('images', 'model') if name in plan},
      **settings_of(comparison), **settings,
    },
  }


def settings_of(comparison: Comparison) -> dict[str, Any]:
  """Return what decides the values, whatever the images are."""
  return {
    'reference': comparison.reference.name, 'reference_images': comparison.reference.count,
    'features': [extractor.name for extractor in comparison.extraction.extractors],
    'metrics': comparison.metrics, 'seed': comparison.seed,
  }


def _measured_and_warnings(
  comparison: Comparison, images: int, about: Sequence[str], tested: Split | None
) -> tuple[list[str], list[str]]:
  reference = comparison.reference
  sets = {REFERENCE: _pictures(reference.images)} if reference.count else {}
  sets |= {TESTED: tested.pictures} if tested else {}
  against = f', against {reference.name}' if reference.count else ''
  count = f' ({reference.count:,} images)' if reference.count else ''
  measured, warnings = [f'Of {images:,} images{against}{count}.', *about], []
  measured += of_features(comparison.named, sets)
  measured += enlarged(comparison, tested.pictures.size) if tested else []
  real = getattr(tested or reference.images, 'records', None)
  for text, warns in clip_checks(comparison, real):
    (warnings if warns else measured).append(text)
  return measured, warnings


def _pictures(images: ImageSet | None):
  while hasattr(images, 'images'):  # A subset.
    images = images.images
  return getattr(images, 'pictures', None)


def enlarged(comparison: Comparison, size: int) -> list[str]:
  """Return a sentence for each network that sees images of that size in pixels enlarged."""
  return [
    f'{one.name} sees them at {one.size} px, enlarged from {size}.'
    for one in comparison.extraction.extractors if one.size > size
  ]


def clip_checks(comparison: Comparison, real: Sequence[Record] | None) -> list[tuple[str, bool]]:
  """Try each CLIP, once, on real images with captions; (sentence, whether it is a warning) each."""
  if comparison.checked is None:
    clips = comparison.clips.values()
    if not real:
      comparison.checked = [(
        f'Whether {clip.extractor.name} knows captions of such pictures was not tried: there are '
        'no real ones with captions.', False,
      ) for clip in clips]
    else:
      records = shuffled(real, min(PAIRS, len(real)))
      found = {clip.extractor.name: real_retrieval(clip, records) for clip in clips}
      comparison.checked = [(one.sentence(name), one.near_chance) for name, one in found.items()]
  return comparison.checked


def write(
  out: Path, scores: Mapping[str, Any], page: Callable[[Path, Mapping[str, Any]], None],
  say: Callable[[str], None] = print,
) -> None:
  """Write a row of FILE.csv unless it is there, the page (by `page`) and the JSON.

  say: is given warnings of values that do not compare with the table's last ones.
  """
  table, new = out.with_suffix('.csv'), rows(scores)
  warnings = incomparable(_before(table, new[0]), new[0])
  for text in warnings:
    say(f'note: {text}')
  if warnings:
    scores = {**scores, 'warnings': [*scores.get('warnings', ()), *warnings]}
  add_rows(table, new)
  page(out.with_suffix('.html'), scores)
  # Last, for a checkpoint that is in here is not scored again.
  with atomic_write(out) as file:
    file.write((json.dumps(scores, indent=2) + '\n').encode())
