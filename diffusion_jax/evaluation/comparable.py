"""Whether a figure may be compared with that of an earlier evaluation in the same table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""COLUMN.FIGURE or settings.NAME -> value, or its text where it was read from a table."""

_FAMILIES = ('clip', 'dinov2', 'classifier')
_FAMILY_OF = {
  'cmmd': 'clip', 'retrieval_r1': 'clip', 'class_accuracy': 'classifier', 'psnr': '', 'ssim': '',
  'l1': '', 'lpips': '',
}
_OF_SETS = re.compile(r'r?s?fi?d(_|$)|precision|recall|density|coverage|kl(_|$)')
"""Figures of two whole sets, which the number of images moves."""
_OF_REFERENCE = re.compile(f'{_OF_SETS.pattern}|kid|cmmd|psnr|ssim|l1$|lpips')
_OF_SAMPLES = re.compile(f'{_OF_SETS.pattern}|inception_score|retrieval')


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


def _differences(figure: str, last: Row, row: Row) -> Iterator[str]:
  features = [_features(one, family_of(figure)) for one in (last, row)]
  if all(features) and features[0] != features[1]:
    was, now = (', '.join(sorted(names)) for names in features)
    networks = [{name.rpartition('/')[0] for name in names} for names in features]
    what = 'images were resized by another rule' if networks[0] == networks[1] else (
      'the features were others'
    )
    yield f'{what} ({was}, now {now})'
  for name, pattern, what in (
    ('reference', _OF_REFERENCE, 'the reference was another'),
    ('reference_images', _OF_REFERENCE, 'the reference had another number of images'),
    ('samples', _OF_SAMPLES, 'there was another number of samples'),
  ):
    was, now = (str(one.get(f'settings.{name}') or '') for one in (last, row))
    infinite = figure.endswith('_infinity') and name != 'reference'
    if was and now and was != now and pattern.match(figure) and not infinite:
      yield f'{what} ({was}, now {now})'


def family_of(figure: str) -> str:
  """inception, clip, dinov2 or classifier; '' for a figure of no features."""
  if figure in _FAMILY_OF or 'bits_per_dim' in figure:
    return _FAMILY_OF.get(figure, '')
  return next((name for name in _FAMILIES if name in figure.split('_')), 'inception')


def _features(row: Row, family: str) -> set[str]:
  """The names of the row's features of a family."""
  names = re.findall(r"'([^']*)'", str(row.get('settings.features', '')))
  return {name for name in names if name.startswith(f'{family}/')}
