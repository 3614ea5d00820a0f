"""What an evaluation leaves: FILE.json, one or more rows of FILE.csv, and a page, FILE.html."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.evaluation.comparable import incomparable
from diffusion_jax.evaluation.table import add_rows, as_read, read_rows
from diffusion_jax.files import atomic_write
from diffusion_jax.viz.evaluation import figure_columns, write_evaluation_page


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
