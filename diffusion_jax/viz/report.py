"""One self-contained HTML page about a run: its progress, scores, samples and settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.config import typed
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, parse_json
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import Point, line_chart, schedule_chart, spread, timestep_chart
from diffusion_jax.viz.run_files import MOST_METRICS, Curve, MetricsFile, Run, is_number, read_run
from diffusion_jax.viz.scores import OWN, ScoreTable, metric_title

ABOUT = 'about'
"""The text in a grid's PNG that says what the grid shows."""
MAX_BYTES = 8_000_000
_THUMBNAILS, _THUMBNAIL_SIZE = 24, 416  # Pixels: twice what the page shows, for dense screens.
_SMOOTHING = 0.8
_LOOKS = {'finished': ' good'} | dict.fromkeys(
  ('failed', 'killed', 'diverged', 'stalled', 'peer_lost', 'unsaved', 'refused'), ' bad'
)
"""Looks of states; all others are neither good nor bad."""
_PHASES = {
  'start': 'starting', 'compile': 'compiling', 'data': 'waiting for data', 'step': 'steps',
  'checkpoint': 'saving', 'evaluation': 'sampling and scoring',
  'lost': 'lost: done again, or never, for want of a checkpoint',
  'down': 'between starts, which is not in the time above',
}
_RESOURCES = {
  'seconds_per_step': 'Seconds per step',
  'goodput': 'Fraction of the time that went into training',
  'skipped_fraction': 'Fraction of steps that were skipped',
  'recompilations': 'Programs compiled after the first line',
  'unreadable': 'Records that could not be read',
  'host_memory': 'Memory of the host, MB', 'host_memory_peak': 'Its peak, MB',
  'device_memory': 'Memory of the fullest device, MB', 'device_memory_peak': 'Its peak, MB',
  'open_files': 'Open files', 'threads': 'Threads',
}
"""Shown in a table, not drawn: they should not change."""
_OF_TIMESTEPS = ('Mean error, before any weighting, over equal ranges of the diffusion time: clean '
                 'data at 0, pure noise at 1.')
_OF_SPEED = ('Of training alone: sampling, scoring and saving are in the table below, not in the '
             'curves.')


def write_report(workdir: Path, metrics: MetricsFile | None = None) -> Path:
  """Write a self-contained `report.html`, below about 8 MB, into a run directory; return it.

  Made from config.json, metrics.jsonl, samples/step_*.png (with the text in the PNG), scores.json,
  versions.json and status.json, each of which may be missing. metrics: an earlier reader of this
  run's metrics, so that each line is read once. UserError: the directory is missing, holds none of
  a run's files, or a JSON file is damaged.
  """
  workdir = Path(workdir)
  run = read_run(workdir, metrics)
  before = _header(run) + _key_figures(run) + _scores(run)
  after = ''.join([
    page.section('loss', 'Loss', 'Faint: as logged. Strong: average of neighbouring points.',
                 _charts(run, lambda key: key.startswith('loss'))),
    page.section('metrics', 'Other metrics', '', _charts(run, _is_other)),
    page.section('learning-rate', 'Learning rate', '', _learning_rates(run)),
    page.section('timesteps', 'Loss by timestep', _OF_TIMESTEPS, _timesteps(run)),
    page.section('speed', 'Speed', _OF_SPEED, _charts(run, _is_speed) + _time_table(run)),
    page.section('resources', 'Resources', '', _resources(run)),
    _unreadable(run), _schedule(run),
    page.section('config', 'Configuration', '', run.config and page.details(
      'All settings', page.settings_table(run.config))),
    page.section('versions', 'Versions', '', run.versions and
                 f'<div class="card">{page.settings_table(run.versions)}</div>'),
    _footer(run),
  ])
  title = f'{_task(run)} · {run.name}'
  frame = len(page.page(title, before + after).encode())
  text = page.page(title, before + _grids(run, MAX_BYTES - frame) + after)
  path = workdir / 'report.html'
  with atomic_write(path) as file:
    file.write(text.encode(errors='replace'))
  return path


def _task(run: Run) -> str:
  return str(run.config.get('task') or 'Training run').replace('_', ' ')


def _header(run: Run) -> str:
  state, errors = run.status.get('state'), run.status.get('trouble')
  pill = page.pill(state, _LOOKS.get(str(state), '')) if state else ''
  notes = [run.status.get('message'), *(errors if isinstance(errors, list) else [])]
  rest = page.escape('; '.join(page.plain(text) for text in notes if text))
  card = ' · <a href="README.md">Model card</a>' if run.has_model_card else ''
  return (
    f'<header>\n<h1>{page.escape(_task(run))}</h1>\n'
    f'<p class="muted">{page.escape(run.name)}{card}</p>\n'
    f'<div>{pill}<span class="muted">{rest}</span></div>\n</header>\n'
  )


def _key_figures(run: Run) -> str:
  """The progress of the run, outdated values marked."""
  line, moment = run.metrics.latest, run.moment
  speeds = _values(run.metrics.train.curve('images_per_second').means)
  found = {}
  if moment.step is not None:
    of = f' of {page.number(moment.of)}' if moment.of else ''
    found['Step'] = f'{page.number(moment.step)}{of}'
  if is_number(line.get('loss')):
    when = '' if line['step'] == moment.step else f' at step {page.number(line["step"])}'
    found[f'Loss{when}'] = page.number(line['loss'])
  if speeds:
    found['Examples/s, median'] = page.number(statistics.median(speeds))
  if moment.seconds is not None:
    found['Time'] = page.duration(moment.seconds)
  items = ''.join(
    f'<div><dt>{page.escape(name)}</dt><dd>{page.escape(value)}</dd></div>\n'
    for name, value in found.items()
  )
  return f'<dl class="figures">\n{items}</dl>\n' if items else ''


def _scores(run: Run) -> str:
  found = ScoreTable.of(run.scores)
  if not found.rows:
    return ''
  rows = [(metric_title(name), list(map(page.number, row))) for name, row in found.rows.items()]
  own = next((i for i, name in enumerate(found.columns) if name in OWN), None)
  body = page.number_table(['', *found.titles], rows, own)
  if found.warnings:
    body += page.details('What to beware of', page.bullets(found.warnings), is_open=True)
  if found.settings:
    body += page.details('How they were measured', page.settings_table(found.settings))
  return page.section('scores', 'Scores', ' '.join(found.measured), body)


def _grids(run: Run, limit: int) -> str:
  """The newest sample grid large, earlier ones small, in about `limit` characters at most."""
  grids = [(step, image) for step, image in map(_opened, spread(run.grids, _THUMBNAILS + 1))
           if image is not None]
  if not grids or limit < 50_000:
    return ''
  (step, newest), earlier = grids[-1], grids[:-1]
  label = f'Step {step:,}'
  about = newest.info['text'].pop(ABOUT, '')
  source = page.embed_image(newest, int(limit * (0.6 if earlier else 0.95)))
  body = f'<figure class="card latest"><img src="{source}" alt="{label}"></figure>'
  body += _image_text(newest)
  thumbnails = []
  for earlier_step, image in earlier:
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    source = page.embed_image(image, int(limit * 0.35 / len(earlier)))
    name = f'step {earlier_step:,}'
    thumbnails.append(
      f'<figure><img src="{source}" alt="{name}"><figcaption>{name}</figcaption></figure>\n'
    )
  body += f'<div class="strip">\n{"".join(thumbnails)}</div>' if thumbnails else ''
  shown = f' Below it {len(earlier)} of {len(run.grids) - 1} earlier ones.' if earlier else ''
  note = ' '.join(part for part in (about, f'{label}.{shown}') if part)
  return page.section('samples', 'Pictures', note, body)


def _opened(grid: tuple[int, Path]) -> tuple[int, Image.Image | None]:
  """(step, image); None for a file that is damaged or still being written."""
  step, path = grid
  try:
    with Image.open(path) as file:
      image = file.convert('RGB')
      image.info = {'text': dict(getattr(file, 'text', {}))}
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return step, None
  return step, image


def _image_text(image: Image.Image) -> str:
  """The text chunks of a PNG: captions, settings; a JSON list as a list."""
  parts = []
  for key, text in image.info.get('text', {}).items():
    try:
      value: Any = parse_json(text)
    except ValueError:
      value = text
    if isinstance(value, list):
      shown = '<ol>' + ''.join(f'<li>{page.escape(page.plain(v))}</li>' for v in value) + '</ol>'
    else:
      shown = page.escape(page.plain(value))
    parts.append(f'<dt class="muted">{page.escape(key)}</dt><dd>{shown}</dd>\n')
  return page.details('About these pictures', f'<dl>{"".join(parts)}</dl>') if parts else ''


def _values(points: Iterable[Point]) -> list[float]:
  return [value for _, value in points if value is not None]


def _chart(curves: dict[str, Curve], title: str, **options: Any) -> str:
  return line_chart(
    {name: curve.points for name, curve in curves.items()}, title=title,
    means={name: curve.means for name, curve in curves.items()},
    left_out=sum(curve.missing for curve in curves.values()), **options,
  )


def _is_speed(key: str) -> bool:
  return key == 'data_wait_fraction' or key.endswith('_per_second')


def _is_other(key: str) -> bool:
  return not (
    key.startswith(('loss', 'learning_rate')) or _is_speed(key) or key in _RESOURCES
    or key in ('samples', 'images')  # The same for all evaluations of a run, as a rule.
  )


def _charts(run: Run, wanted: Callable[[str], bool]) -> str:
  """One chart for each metric, with training and evaluation in one where both have it."""
  kinds = {'training': run.metrics.train, 'evaluation': run.metrics.evaluation}
  charts = []
  for key in filter(wanted, dict.fromkeys(name for kind in kinds.values() for name in kind.names)):
    curves = {name: metrics.curve(key) for name, metrics in kinds.items()}
    curves = {name: curve for name, curve in curves.items() if curve.points}
    positive = [v for curve in curves.values() for v in _values(curve.points) if v > 0]
    wide = bool(positive) and not _is_speed(key) and max(positive) > 20 * min(positive)
    title = metric_title(key)
    charts.append((title, _chart(curves, title, smoothing=_SMOOTHING, log_y=wide)))
  return page.chart_grid(charts)


def _learning_rates(run: Run) -> str:
  metrics = run.metrics.train
  keys = [name for name in metrics.names if name.startswith('learning_rate')]
  chart = lambda: _chart({key: metrics.curve(key) for key in keys}, 'Learning rate')
  return page.chart_grid([(', '.join(map(metric_title, keys)), chart())] if keys else [])


def _timesteps(run: Run) -> str:
  key = 'loss_by_timestep'
  records = [
    (line['step'], [v if is_number(v) else None for v in line[key]])
    for line in run.metrics.train.lines if isinstance(line.get(key), list) and line[key]
  ]
  chart = lambda: timestep_chart(records, title='Loss by timestep')
  return page.chart_grid([('Loss over t / T', chart())] if records else [])


def _time_table(run: Run) -> str:
  """The time of all starts, by phase."""
  found = run.status.get('goodput')
  spent = {n: s for n, s in found.items() if is_number(s)} if isinstance(found, dict) else {}
  if not (total := sum(spent.values())):
    return ''
  rows = [(_PHASES.get(name, name), s) for name, s in spent.items()] + [('all of it', total)]
  return page.number_table(['Time of all starts', '', 'fraction'], [
    (name, [page.duration(s), f'{100 * s / total:.1f} %']) for name, s in rows
  ])


def _resources(run: Run) -> str:
  rows = []
  for key, title in _RESOURCES.items():
    scale = 1e-6 if 'memory' in key else 1.0
    curve = run.metrics.train.curve(key)
    if values := _values(curve.points):
      shown = (curve.first, curve.last, max(values))
      rows.append((title, [page.number(scale * v) for v in shown]))
  return page.number_table(['', 'first line', 'last line', 'most'], rows) if rows else ''


def _unreadable(run: Run) -> str:
  found = run.status.get('unreadable')
  if not isinstance(found, dict) or not isinstance(found.get('first'), list):
    return ''
  return page.section(
    'unreadable', 'Pictures that could not be read',
    f'{page.plain(found.get("records"))} in the last start. Others took their place.',
    page.details('Which, and why', page.bullets(found['first'])),
  )


def _schedule(run: Run) -> str:
  """The noise schedule of training; nothing for none, or an unknown one."""
  settings = run.config.get('settings')
  values = settings.get('schedule') if isinstance(settings, dict) else None
  if not isinstance(values, dict):
    return ''
  try:
    config = typed(NoiseConfig, values)
    schedule = NoiseSchedule.of(config)
  except (UserError, TypeError):  # Of another version.
    return ''
  alphas, sigmas = schedule.levels()
  times = np.arange(1, len(alphas) + 1) / len(alphas)
  name = config.beta_schedule if config.is_table else config.process
  steps = f', at t of {len(alphas):,} steps' if config.is_table else ''
  chart = schedule_chart(times, alphas, sigmas, title='Noise schedule')
  note = f'A noised image is α times the image and σ times noise{steps}.'
  if sigmas[-1] > 0 == alphas[-1]:
    note += ' The last step is pure noise.'
  return page.section('schedule', 'Noise schedule', note, page.chart_grid([(name, chart)]))


def _footer(run: Run) -> str:
  notes = []
  if unreadable := run.metrics.unreadable:
    lines = '1 line' if unreadable == 1 else f'{unreadable} lines'
    notes.append(f'{lines} of metrics.jsonl could not be read: left out.')
  if run.metrics.train.left_out or run.metrics.evaluation.left_out:
    notes.append(f'Of the metrics only the first {MOST_METRICS} by name are shown.')
  return f'<footer class="muted">{" ".join(notes)}</footer>' if notes else ''
