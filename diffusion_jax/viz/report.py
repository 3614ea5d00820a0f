"""One self-contained HTML page about a run: what it is, how good, pictures, curves, settings."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.config import typed
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, bounded_bytes, parse_json
from diffusion_jax.viz import learning, page
from diffusion_jax.viz.charts import Point, line_chart, schedule_charts, spread, timestep_chart
from diffusion_jax.viz.page import Figure
from diffusion_jax.viz.run_files import MOST_METRICS, Curve, MetricsFile, Run, is_number, read_run
from diffusion_jax.viz.scores import ScoreTable, best_known, metric_unit, metric_words

ABOUT = 'about'
"""The text in a grid's PNG that says what the grid shows."""
MAX_BYTES = 8_000_000
MOST_GRIDS = 40
"""Grids that a page shows, spread evenly over the run."""
_SMOOTHING = 0.8
_MOST_ALT = 600
"""Letters that a screen reader says of a grid."""
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
RESOURCES = {
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
  versions.json, status.json and README.md, each of which may be missing. metrics: an earlier reader
  of this run's metrics, so that each line is read once. UserError: the directory is missing, holds
  none of a run's files, or a JSON file is damaged.
  """
  workdir = Path(workdir)
  text = report_page(read_run(workdir, metrics))
  path = workdir / 'report.html'
  with atomic_write(path) as file:
    file.write(text.encode(errors='replace'))
  return path


def report_page(run: Run, live: bool = False) -> str:
  """Return the page of a run; live: it is served, and asks for news."""
  about = (page.LIVE if live else '') + header(run) + page.figures(_good(run)) + progress(run)
  after = ''.join([
    _scores(run), learning.section(run),
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
    learning.recommended(run), _footer(run),
  ])
  title = f'{name_of(run)} · {run.name}'
  frame = len(page.page(title, page.first_screen(about, '') + after).encode())
  return page.page(title, page.first_screen(about, _grids(run, MAX_BYTES - frame)) + after)


def name_of(run: Run) -> str:
  """Return what a run trains, as its model card says it, else its task."""
  titled = run.card.get('title', '').partition(' (')[0]
  return titled or str(run.config.get('task') or 'Training run').replace('_', ' ')


def header(run: Run, heading: str = 'h1', card: str = 'README.md') -> str:
  """Return `body` of what a run trains, on what, and how it stands; card: where its card is."""
  state, errors = run.status.get('state'), run.status.get('trouble')
  pill = page.pill(page.words(str(state)).lower(), _LOOKS.get(str(state), '')) if state else ''
  notes = [run.status.get('message'), *(errors if isinstance(errors, list) else [])]
  rest = page.escape('; '.join(page.plain(text) for text in notes if text))
  link = f' · <a href="{page.escape(card)}">Model card</a>' if card and run.has_model_card else ''
  trained = _trained_on(run)
  return (
    f'<header>\n<{heading}>{page.escape(name_of(run))}</{heading}>\n'
    + (f'<p class="lead">{page.escape(trained)}</p>\n' if trained else '')
    + f'<p class="muted">{page.escape(run.name)}{link}</p>\n'
    f'<div>{pill}<span class="muted">{rest}</span></div>\n</header>\n{_bar(run)}'
  )


def _trained_on(run: Run) -> str:
  """A sentence of the size of the model, the data and the batch, as far as they are known."""
  section = lambda name: found if isinstance(found := run.config.get(name), dict) else {}
  data, loop = section('data'), section('loop')
  dataset = ', '.join(
    f'{page.plain(data[key])}{unit}' for key, unit in (('dataset', ''), ('size', ' pixels'))
    if data.get(key)
  )
  parts = []
  if count := run.card.get('Trained parameters'):
    parts.append(f'{count} trained parameters')
  if dataset := run.card.get('Data', dataset):
    parts.append(f'on {dataset}')
  if is_number(batch := loop.get('batch_size')):
    parts.append(f'batch {page.number(batch)}')
  return '; '.join(parts)


def _bar(run: Run) -> str:
  """The progress of a run that goes on, with the time that is left."""
  step, of, _ = run.moment
  if run.status.get('state') == 'finished' or step is None or not of or not 0 <= step <= of:
    return ''
  speed = _values(run.metrics.train.curve('seconds_per_step').means)[-10:]
  left = (of - step) * statistics.median(speed) if speed else 0
  rest = f', about {page.duration(left)} of training left' if left else ''
  text = f'{100 * step / of:.0f} % of {page.number(of)} steps{rest}'
  return (f'<progress max="100" value="{100 * step / of:.1f}" aria-label="progress"></progress>\n'
          f'<p class="muted">{page.escape(text)}</p>\n')


def _good(run: Run) -> list[Figure]:
  found = ScoreTable.of(run.scores)
  return best_known(found.rows, found.titles, found.own)


def progress(run: Run) -> str:
  """Return `body` of how far a run is, outdated values marked."""
  line, moment = run.metrics.latest, run.moment
  speeds = _values(run.metrics.train.curve('images_per_second').means)
  found = []
  if moment.step is not None:
    of = f' of {page.number(moment.of)}' if moment.of else ''
    found.append(Figure('Step', f'{page.number(moment.step)}{of}'))
  if is_number(line.get('loss')):
    when = '' if line['step'] == moment.step else f' at step {page.number(line["step"])}'
    found.append(Figure(f'Loss{when}', page.number(line['loss'])))
  if speeds:
    found.append(Figure('Examples/s, median', page.number(statistics.median(speeds))))
  if moment.seconds is not None:
    found.append(Figure('Time', page.duration(moment.seconds)))
  return page.figures(found, small=True)


def _scores(run: Run) -> str:
  found = ScoreTable.of(run.scores)
  if not found.rows:
    return ''
  rows = [(metric_words(name), list(map(page.number, row))) for name, row in found.rows.items()]
  body = page.number_table(['', *found.titles], rows, found.own)
  if found.warnings:
    body += page.details('What to beware of', page.bullets(found.warnings), is_open=True)
  if found.settings:
    body += page.details('How they were measured', page.settings_table(found.settings))
  return page.section('scores', 'Scores', ' '.join(found.measured), body)


def _grids(run: Run, limit: int) -> str:
  """The sample grids of all steps, in about `limit` characters at most."""
  frames, newest = read_frames(run, limit)
  if not frames:
    return ''
  about, text = newest.info['text'].pop(ABOUT, ''), _image_text(newest)
  shown = '' if len(frames) == len(run.grids) else f'{len(frames)} of {len(run.grids)} steps.'
  note = ' '.join(part for part in (about, shown) if part)
  return page.section('samples', 'Pictures', note, page.flip([('', frames)]) + text)


def read_frames(run: Run, limit: int) -> tuple[list[page.Frame], Image.Image | None]:
  """Return (the sample grids, the newest as an image with its text), in order of the step.

  limit: characters of all of them, at most, about; earlier ones are made smaller first.
  """
  grids = [grid for grid in map(_opened, spread(run.grids, MOST_GRIDS)) if grid is not None]
  if not grids or limit < 50_000:
    return [], None
  frames = []
  for step, image, data in grids:
    is_last = step == grids[-1][0]
    share = 0.95 if len(grids) == 1 else 0.4 if is_last else 0.55 / (len(grids) - 1)
    captions = image.info['text'].get('captions', '')
    label = f'Step {step:,}' + (f': {", ".join(_listed(captions))}' if _listed(captions) else '')
    fits = len(data) * 4 / 3 <= limit * share
    source = page.png_source(data) if fits else page.embed_image(image, int(limit * share))
    frames.append(page.Frame(step, source, label[:_MOST_ALT]))
  return frames, grids[-1][1]


def _listed(text: str) -> list[str]:
  try:
    value = parse_json(text) if text else []
  except ValueError:
    return []
  return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _opened(grid: tuple[int, Path]) -> tuple[int, Image.Image, bytes] | None:
  """(step, image, file); None for one that is damaged or still being written."""
  step, path = grid
  try:
    data = bounded_bytes(path)
    with Image.open(io.BytesIO(data), formats=['PNG']) as file:
      image = file.convert('RGB')
      image.info = {'text': dict(getattr(file, 'text', {}))}
  except (OSError, SyntaxError, ValueError, UserError, Image.DecompressionBombError):
    return None
  return step, image, data


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


def chart(curves: dict[str, Curve], title: str, unit: str, **options: Any) -> str:
  """Return a chart of metrics by name."""
  return line_chart(
    {name: curve.points for name, curve in curves.items()}, title=title, ylabel=unit,
    means={name: curve.means for name, curve in curves.items()},
    left_out=sum(curve.missing for curve in curves.values()), **options,
  )


def _is_speed(key: str) -> bool:
  return key == 'data_wait_fraction' or key.endswith('_per_second')


def _is_other(key: str) -> bool:
  return not (
    key.startswith(('loss', 'learning_rate')) or _is_speed(key) or key in RESOURCES
    or key in ('samples', 'images')  # The same for all evaluations of a run, as a rule.
  )


def _charts(run: Run, wanted: Callable[[str], bool]) -> str:
  """One chart for each metric, with training and evaluation in one where both have it; metrics
  with a single value are figures, unless they are among the scores."""
  scored = ScoreTable.of(run.scores).rows
  kinds = {'training': run.metrics.train, 'evaluation': run.metrics.evaluation}
  charts, single = [], []
  for key in filter(wanted, dict.fromkeys(name for kind in kinds.values() for name in kind.names)):
    curves = {name: metrics.curve(key) for name, metrics in kinds.items()}
    curves = {name: curve for name, curve in curves.items() if curve.points}
    title, points = metric_words(key), [p for curve in curves.values() for p in curve.points]
    if len(points) == 1 and points[0][1] is not None:
      if points[0][1] in scored.get(key, ()):
        continue
      single.append(Figure(title, page.number(points[0][1]), f'at step {points[0][0]:,}'))
    else:
      charts.append((title, _drawn(key, curves, title)))
  return page.figures(single) + page.chart_grid(charts)


def _drawn(key: str, curves: dict[str, Curve], title: str) -> str:
  positive = [v for curve in curves.values() for v in _values(curve.points) if v > 0]
  wide = bool(positive) and not _is_speed(key) and max(positive) > 20 * min(positive)
  return chart(curves, title, metric_unit(key), smoothing=_SMOOTHING, log_y=wide)


def _learning_rates(run: Run) -> str:
  metrics = run.metrics.train
  keys = [name for name in metrics.names if name.startswith('learning_rate')]
  curves = {metric_words(key): metrics.curve(key) for key in keys}
  drawn = lambda: chart(curves, 'Learning rate', metric_unit('learning_rate'))
  return page.chart_grid([(', '.join(curves), drawn())] if keys else [])


def _timesteps(run: Run) -> str:
  key = 'loss_by_timestep'
  records = [
    (line['step'], [v if is_number(v) else None for v in line[key]])
    for line in run.metrics.train.lines if isinstance(line.get(key), list) and line[key]
  ]
  drawn = lambda: timestep_chart(records, title='Loss by timestep')
  return page.chart_grid([('Loss over t / T', drawn())] if records else [])


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
  for key, title in RESOURCES.items():
    scale = 1e-6 if 'memory' in key else 1.0
    curve = run.metrics.train.curve(key)
    if values := _values(curve.points):
      shown = (curve.first, curve.last, max(values))
      rows.append((title, [page.number(scale * v) for v in shown]))
  return page.number_table(['', 'first', 'last', 'most'], rows) if rows else ''


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
  note = f'{page.words(name)}. A noised image is α times the image and σ times noise{steps}.'
  if sigmas[-1] > 0 == alphas[-1]:
    note += ' The last step is pure noise.'
  return page.section('schedule', 'Noise schedule', note,
                      page.chart_grid(schedule_charts(times, alphas, sigmas)))


def _footer(run: Run) -> str:
  notes = []
  if unreadable := run.metrics.unreadable:
    lines = '1 line' if unreadable == 1 else f'{unreadable} lines'
    notes.append(f'{lines} of metrics.jsonl could not be read: left out.')
  if run.metrics.train.left_out or run.metrics.evaluation.left_out:
    notes.append(f'Of the metrics only the first {MOST_METRICS} by name are shown.')
  return f'<footer class="muted">{" ".join(notes)}</footer>' if notes else ''
