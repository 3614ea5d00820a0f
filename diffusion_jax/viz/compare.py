"""One self-contained HTML page of runs side by side: scores, pictures, curves, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.config import flatten
from diffusion_jax.evaluation.arms import Comparison, Difference, Reached, settings_row
from diffusion_jax.evaluation.metrics.bootstrap import Interval
from diffusion_jax.evaluation.report import differences
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import STEP
from diffusion_jax.viz.plot import EDGE, Line, Scale, plot
from diffusion_jax.viz.report import MAX_BYTES, RESOURCES, chart, header, progress, read_frames
from diffusion_jax.viz.run_files import Run, read_run
from diffusion_jax.viz.scores import ScoreTable, metric_unit, metric_words

_LEFT_OUT = (*RESOURCES, 'samples', 'images')
"""Of lines of metrics, what says nothing of a model."""
_ABSENT = '–'


def comparison_page(workdirs: Sequence[Path]) -> str:
  """Return the page of run directories. UserError as of `read_run`."""
  runs = [read_run(Path(workdir)) for workdir in workdirs]
  return _page(_names(runs), runs)


def arms_page(comparison: Comparison) -> str:
  """Return the page of arms: their paired differences, then a run of each side by side."""
  runs = [arm.runs[comparison.seeds[0]] for arm in comparison.arms]
  return _page([arm.name for arm in comparison.arms], runs, _paired(comparison))


def _page(names: Sequence[str], runs: Sequence[Run], first: str = '') -> str:
  words = ''.join(f'<div>{header(run, "h2", card="")}{progress(run)}</div>\n' for run in runs)
  title = ' beside '.join(names)
  about = f'<h1>{page.escape(title)}</h1>\n<div class="pair words">\n{words}</div>\n'
  frames = [(page.escape(name), read_frames(run, MAX_BYTES // (len(runs) + 1))[0])
            for name, run in zip(names, runs, strict=True)]
  shown = [one for one in frames if one[1]]
  curves = lambda wanted: page.chart_grid(_curves(names, runs, wanted))
  body = ''.join([
    page.first_screen(about, ''),
    first,
    _scores(names, runs),
    page.section('samples', 'Pictures', 'Of each the newest up to the step of the slider.',
                 page.flip(shown) if shown else ''),
    page.section('loss', 'Loss', '', curves(lambda key: key.startswith('loss'))),
    page.section('metrics', 'Other metrics', '', curves(lambda key: not key.startswith('loss'))),
    _settings(names, runs),
  ])
  return page.page(title, body)


def _paired(comparison: Comparison) -> str:
  """The differences from the first arm, with intervals."""
  seeds = len(comparison.seeds)
  note = (
    f'Each arm less {comparison.arms[0].name}, in pairs of one seed ({seeds} '
    f'{"seed" if seeds == 1 else "seeds"}), with intervals that hold the true difference in 95 of '
    '100 such comparisons. An interval without 0 is marked by a star.'
  )
  table = page.number_table(
    ['', 'arm', 'at step', 'difference', 'interval', 'by'], [_row(one) for one in
                                                             comparison.differences],
  )
  body = table + _times(comparison.reached) + page.chart_grid(_bands(comparison))
  if comparison.notes:
    body += page.details('What to beware of', page.bullets(comparison.notes), is_open=True)
  return page.section('differences', 'Paired differences', note, body)


def _row(one: Difference) -> tuple[str, list[str]]:
  when = f'{one.step:,}' if one.step else 'last half'
  star = ' *' if one.interval.low > 0 or one.interval.high < 0 else ''
  return metric_words(one.metric), [
    one.arm, when, f'{one.interval.estimate:+.4g}{star}', interval_words(one.interval),
    one.interval.method,
  ]


def interval_words(interval: Interval) -> str:
  """Return both bounds, or a dash where there are none."""
  if not math.isfinite(interval.low):
    return _ABSENT
  return f'{interval.low:+.4g} to {interval.high:+.4g}'


def _times(reached: Sequence[Reached]) -> str:
  if not reached:
    return ''
  table = []
  for one in reached:
    steps = [f'{step:,}' if step else 'never' for step in one.steps.values()]
    seconds = [_ABSENT if time is None else page.duration(time) for time in one.seconds.values()]
    ratio = _ABSENT if one.ratio is None else (
      page.number(one.ratio.estimate) + (
        f'\n{one.ratio.low:.4g} to {one.ratio.high:.4g}' if math.isfinite(one.ratio.low) else ''
      )
    )
    table.append((f'{metric_words(one.metric)} {page.number(one.value)}',
                  [one.arm, ', '.join(steps), ', '.join(seconds), ratio]))
  columns = ['Time to a value', 'arm', 'steps, by seed', 'time, by seed', 'ratio of steps']
  return page.number_table(columns, table)


def _bands(comparison: Comparison) -> list[tuple[str, str]]:
  """A chart for each metric and arm of the difference over the steps, bounds dashed."""
  charts = []
  kinds = dict.fromkeys((one.metric, one.arm) for one in comparison.curves)
  for metric, arm in kinds:
    own = [one for one in comparison.curves if (one.metric, one.arm) == (metric, arm)]
    if len(own) < 2:
      continue
    bound = lambda name, own=own: [(one.step, getattr(one.interval, name)) for one in own]
    lines = [Line('difference', bound('estimate'))]
    if len(comparison.seeds) > 1:
      lines += [Line(f'{name} bound', bound(name), 'dashed', colour=1) for name in ('low', 'high')]
    values = [value for line in lines for _, value in line.points] + [0.0]
    title = f'{metric_words(metric)}: {arm} less {comparison.arms[0].name}'
    charts.append((title, plot(
      lines, Scale.of([one.step for one in own]), Scale.of(values, room=EDGE), title=title,
      xlabel=STEP, ylabel=metric_unit(metric),
    )))
  return charts


def _names(runs: Sequence[Run]) -> list[str]:
  """Names that differ."""
  names = [run.name for run in runs]
  different = len(set(names)) == len(names)
  return names if different else [f'{name} ({n})' for n, name in enumerate(names, 1)]


def _scores(names: Sequence[str], runs: Sequence[Run]) -> str:
  found = [ScoreTable.of(run.scores) for run in runs]
  own = [{} if one.own is None else list(one.columns.values())[one.own] for one in found]
  metrics = dict.fromkeys([name for column in own for name in column])
  two, table = len(runs) == 2, []
  for name in metrics:
    values = [column.get(name) for column in own]
    more = [_difference(*values)] if two else []
    table.append((metric_words(name), [*map(page.number, values), *more]))
  if not table:
    return ''
  body = page.number_table(['', *names, *['difference'] * two], table)
  if warnings := _incomparable(metrics, found):
    body += page.details('What to beware of', page.bullets(warnings), is_open=True)
  return page.section('scores', 'Scores', 'Arrows say which way is better.', body)


def _difference(first: Any, second: Any) -> str:
  numbers = [value for value in (first, second) if isinstance(value, (int, float))]
  if len(numbers) < 2:
    return _ABSENT
  return f'{"+" if second > first else ""}{page.number(second - first)}'


def _incomparable(metrics: Iterable[str], scores: Sequence[ScoreTable]) -> list[str]:
  """Sentences on scores that differ from the first run's by more than the model."""
  first, *others = map(settings_row, scores)
  found: dict[str, dict[str, None]] = {}
  for metric in metrics:
    for other in others:
      for reason in differences(metric, first, other):
        found.setdefault(reason, {})[metric_words(metric)] = None
  return [f'{"; ".join(named)}: {reason}; do not compare them.' for reason, named in found.items()]


def _curves(
  names: Sequence[str], runs: Sequence[Run], wanted: Callable[[str], bool]
) -> list[tuple[str, str]]:
  """A chart for each metric with more than one value in any run."""
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


def _settings(names: Sequence[str], runs: Sequence[Run]) -> str:
  """The settings that differ."""
  flat = [flatten(run.config) for run in runs]
  every = dict.fromkeys(key for one in flat for key in one)
  different = [
    (key, [page.plain(one[key]) if key in one else _ABSENT for one in flat]) for key in every
    if any(one.get(key, _ABSENT) != flat[0].get(key, _ABSENT) for one in flat)
  ]
  same = len(every) - len(different)
  table = page.word_table(['setting', *names], different) if different else ''
  note = f'{len(different):,} differ, {same:,} are the same.' if every else ''
  body = table or ('<p>None differs.</p>' if every else '')
  return page.section('config', 'Settings that differ', note, body)
