"""One self-contained HTML page of two runs side by side: scores, pictures, curves, differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion_jax.evaluation.report import differences
from diffusion_jax.viz import page
from diffusion_jax.viz.report import MAX_BYTES, RESOURCES, chart, header, progress, read_frames
from diffusion_jax.viz.run_files import Run, read_run
from diffusion_jax.viz.scores import ScoreTable, metric_unit, metric_words

_LEFT_OUT = (*RESOURCES, 'samples', 'images')
"""Of lines of metrics, what says nothing of a model."""
_ABSENT = '–'


def comparison_page(first: Path, second: Path) -> str:
  """Return the page of two run directories. UserError as of `read_run`."""
  runs = [read_run(Path(first)), read_run(Path(second))]
  names = _names(runs)
  words = ''.join(f'<div>{header(run, "h2", card="")}{progress(run)}</div>\n' for run in runs)
  about = (
    f'<h1>{page.escape(names[0])} beside {page.escape(names[1])}</h1>\n'
    f'<div class="pair words">\n{words}</div>\n'
  )
  frames = [(page.escape(name), read_frames(run, MAX_BYTES // 3)[0])
            for name, run in zip(names, runs, strict=True)]
  shown = [one for one in frames if one[1]]
  curves = lambda wanted: page.chart_grid(_curves(names, runs, wanted))
  body = ''.join([
    page.first_screen(about, ''),
    _scores(names, runs),
    page.section('samples', 'Pictures', 'Of each the newest up to the step of the slider.',
                 page.flip(shown) if shown else ''),
    page.section('loss', 'Loss', '', curves(lambda key: key.startswith('loss'))),
    page.section('metrics', 'Other metrics', '', curves(lambda key: not key.startswith('loss'))),
    _settings(names, runs),
  ])
  return page.page(f'{names[0]} beside {names[1]}', body)


def _names(runs: list[Run]) -> list[str]:
  """Names that differ."""
  names = [run.name for run in runs]
  return names if names[0] != names[1] else [f'{name} ({n})' for n, name in enumerate(names, 1)]


def _scores(names: list[str], runs: list[Run]) -> str:
  found = [ScoreTable.of(run.scores) for run in runs]
  own = [{} if one.own is None else list(one.columns.values())[one.own] for one in found]
  metrics = dict.fromkeys([name for column in own for name in column])
  table = []
  for name in metrics:
    values = [column.get(name) for column in own]
    table.append((metric_words(name), [*map(page.number, values), _difference(*values)]))
  if not table:
    return ''
  body = page.number_table(['', *names, 'difference'], table)
  if warnings := _incomparable(metrics, found):
    body += page.details('What to beware of', page.bullets(warnings), is_open=True)
  return page.section('scores', 'Scores', 'Arrows say which way is better.', body)


def _difference(first: Any, second: Any) -> str:
  numbers = [value for value in (first, second) if isinstance(value, (int, float))]
  if len(numbers) < 2:
    return _ABSENT
  return f'{"+" if second > first else ""}{page.number(second - first)}'


def _incomparable(metrics: Iterable[str], scores: list[ScoreTable]) -> list[str]:
  """Sentences on scores that differ by more than the model."""
  first, second = map(_row, scores)
  found: dict[str, list[str]] = {}
  for metric in metrics:
    for reason in differences(metric, first, second):
      found.setdefault(reason, []).append(metric_words(metric))
  return [f'{"; ".join(named)}: {reason}; do not compare them.' for reason, named in found.items()]


def _row(scores: ScoreTable) -> dict[str, str]:
  """Settings as in a table of evaluations, where features are a list."""
  listed = lambda value: str([value]) if isinstance(value, str) else str(value)
  return {f'settings.{name}': listed(value) if name == 'features' else str(value)
          for name, value in scores.settings.items()}


def _curves(
  names: list[str], runs: list[Run], wanted: Callable[[str], bool]
) -> list[tuple[str, str]]:
  """A chart for each metric with more than one value in either run."""
  found = []
  kinds = [[(run.metrics.train, ''), (run.metrics.evaluation, ', evaluation')] for run in runs]
  keys = dict.fromkeys(key for run in kinds for metrics, _ in run for key in metrics.names)
  for key in filter(wanted, keys):
    curves = {
      f'{name}{kind}': curve for name, run in zip(names, kinds, strict=True)
      for metrics, kind in run if (curve := metrics.curve(key)).points
    }
    if key not in _LEFT_OUT and any(len(curve.points) > 1 for curve in curves.values()):
      title = metric_words(key)
      found.append((title, chart(curves, title, metric_unit(key), log_y=True)))
  return found


def _settings(names: list[str], runs: list[Run]) -> str:
  """The settings that differ."""
  flat = [dict(_flat(run.config)) for run in runs]
  both = dict.fromkeys([*flat[0], *flat[1]])
  different = [
    (key, [page.plain(one[key]) if key in one else _ABSENT for one in flat]) for key in both
    if flat[0].get(key, _ABSENT) != flat[1].get(key, _ABSENT)
  ]
  same = len(both) - len(different)
  table = page.word_table(['setting', *names], different) if different else ''
  note = f'{len(different):,} differ, {same:,} are the same.' if both else ''
  body = table or ('<p>None differs.</p>' if both else '')
  return page.section('config', 'Settings that differ', note, body)


def _flat(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in values.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f'{path}{key}.')
    else:
      yield f'{path}{key}', value
