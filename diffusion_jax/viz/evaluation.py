"""One self-contained HTML page about an evaluation: values, warnings, images of both sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion_jax.evaluation.comparison import Comparison, Found
from diffusion_jax.evaluation.extract import Features
from diffusion_jax.evaluation.metrics.gaussians import PrincipalComponents, principal_components
from diffusion_jax.evaluation.metrics.images import class_hits, clip_score_of_each
from diffusion_jax.evaluation.metrics.manifold import nearest_neighbours
from diffusion_jax.evaluation.pieces import Thumbnails
from diffusion_jax.evaluation.report import columns_of
from diffusion_jax.files import atomic_write
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import cloud_chart, line_chart
from diffusion_jax.viz.page import Figure
from diffusion_jax.viz.scores import COLUMNS, OWN, best_known, metric_unit, metric_words
from diffusion_jax.viz.sweep import sweep_charts

MOST_POINTS = 1000
"""Points of a set in a scatter plot; more make the page large and show nothing else."""
MOST_COLUMNS = 4
"""More are shown as rows."""
SWEPT = ('Each point is a combination. Network calls are those for one picture, guided steps count '
         'twice.')

BY_STEP = ('The divergence of each step from timestep t to t - 1, L_{t-1}, mean over images; data '
           'are on the left. With the two ends its sum is the bound.')


class Pair(NamedTuple):
  """A sample and its most similar reference image; similarity: a cosine."""

  sample: UInt8[np.ndarray, 'h w 3']
  reference: UInt8[np.ndarray, 'h w 3']
  similarity: float
  name: str = ''


class Shown(NamedTuple):
  """A sample, its number, and its caption if it has one."""

  sample: UInt8[np.ndarray, 'h w 3']
  number: int
  caption: str = ''


class Prompt(NamedTuple):
  """A sample with its caption and their CLIP score."""

  sample: UInt8[np.ndarray, 'h w 3']
  caption: str
  score: float


class ClassRow(NamedTuple):
  """Fractions of images of a class that are found to be of it, by column; count: in the first."""

  name: str
  count: int
  accuracies: Mapping[str, float]


def write_evaluation_page(
  path: Path, scores: Mapping[str, Any], *,
  clouds: Mapping[str, PrincipalComponents] = MappingProxyType({}),
  first: Sequence[Shown] = (), pairs: Sequence[Pair] = (),
  best: Sequence[Prompt] = (), worst: Sequence[Prompt] = (),
  reconstructions: Mapping[str, Sequence[Pair]] | None = None,
  settling: Mapping[str, np.ndarray] = MappingProxyType({}), classes: Sequence[ClassRow] = (),
) -> None:
  """Write a self-contained page.

  Args:
    scores: of `evaluation.report.report`; of a sweep, 'sweep' has each column's combination and
      network calls; 'history' has a line of values for each checkpoint of a run.
    first: the samples that come first, none chosen.
    pairs: the samples most like a reference image, the most alike first.
    best, worst: the samples that fit their captions best and worst, those first.
    reconstructions: 'best' and 'worst', with their originals, similarity the PSNR in dB.
    settling: by sampler uint8 [n steps h w 3], the same noise by more and more steps.
    classes: those that come out worst.
  """
  body = (
    page.first_screen(_header(path.stem, scores) + page.figures(_good(scores)), _first(first))
    + _figures(scores) + _measured(scores) + _warnings(scores) + _classes(classes)
    + _reconstructions('worst', (reconstructions or {}).get('worst', ()))
    + _reconstructions('best', (reconstructions or {}).get('best', ()))
    + page.section('sweep', 'Sweep', SWEPT, page.chart_grid(sweep_charts(scores)))
    + page.section('steps', 'Bound by timestep', BY_STEP, page.chart_grid(_by_step(scores)))
    + _settling(scores, settling)
    + _history(scores)
    + _prompts('best', 'Best prompts', best) + _prompts('worst', 'Worst prompts', worst)
    + _clouds(clouds) + _pairs(pairs) + _settings(scores)
  )
  with atomic_write(path) as file:
    file.write(page.page(f'Evaluation · {path.stem}', body).encode())


def _header(name: str, scores: Mapping[str, Any]) -> str:
  """`body` of what was scored, and against what."""
  settings = scores.get('settings', {})
  subject = next((settings[k] for k in ('model', 'images') if settings.get(k)), name)
  against = [page.plain(settings[k]) for k in ('images', 'reference')
             if settings.get(k) and settings[k] != subject]
  lead = f'<p class="lead">{page.escape("Against " + ", ".join(against))}</p>\n' if against else ''
  return (f'<header>\n<h1>{page.escape(page.plain(subject))}</h1>\n{lead}'
          f'<p class="muted">Evaluation · {page.escape(name)}</p>\n</header>\n')


def _own(scores: Mapping[str, Any]) -> str:
  """The column that is the subject: of a sweep the best one."""
  columns = columns_of(scores)
  known = next((name for name in columns if name in OWN), columns[0] if columns else '')
  return scores.get('settings', {}).get('best', known)


def _good(scores: Mapping[str, Any]) -> list[Figure]:
  columns = columns_of(scores)
  own = _own(scores)
  shown = [name for name in columns if name == own or name not in scores.get('sweep', {})]
  metrics = dict.fromkeys(metric for name in shown for metric in scores[name])
  rows = {metric: [scores[name].get(metric) for name in shown] for metric in metrics}
  place = shown.index(own) if own in shown else None
  return best_known(rows, [COLUMNS.get(name, name) for name in shown], place)


def _first(shown: Sequence[Shown]) -> str:
  note = 'The first, none chosen.'
  return page.section('first', 'Pictures', note, page.strip([
    ([(one.sample, one.caption or f'sample {one.number}')], page.escape(one.caption))
    for one in shown
  ], large=True))


def _figures(scores: Mapping[str, Any]) -> str:
  columns, intervals = columns_of(scores), scores.get('intervals', {})
  metrics = list(dict.fromkeys(metric for column in columns for metric in scores[column]))
  first = _own(scores)
  cell = lambda column, metric: _cell(
    scores[column].get(metric), intervals.get(metric) if column == first else None
  )
  note = '95 % confidence intervals in brackets, where there are any.' if intervals else ''
  titles = [COLUMNS.get(column, column) for column in columns]
  if len(columns) > MOST_COLUMNS:
    rows = [(title, [cell(column, metric) for metric in metrics])
            for title, column in zip(titles, columns, strict=True)]
    table = page.number_table(['', *map(metric_words, metrics)], rows)
    return page.section('figures', 'Figures', note, table)
  rows = [(metric_words(metric), [cell(column, metric) for column in columns])
          for metric in metrics]
  own = columns.index(first) if first in columns else None
  return page.section('figures', 'Figures', note, page.number_table(['', *titles], rows, own))


def _history(scores: Mapping[str, Any]) -> str:
  """A curve over the run's steps for each metric; of a single step they are in the table."""
  lines = scores.get('history', [])
  names = dict.fromkeys(name for line in lines for name in line if name != 'step')
  charts = [
    (metric_words(name), line_chart(
      {metric_words(name): [(line['step'], line.get(name)) for line in lines]},
      title=f'{name} of each checkpoint', ylabel=metric_unit(name))) for name in names
  ]
  return page.section('history', 'Checkpoints', '', page.chart_grid(charts if lines[1:] else []))


def _by_step(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The bits of each step, and their sum up to it, of a model on pixels and of others beside it."""
  found = dict(scores.get('bound_by_step', {}))
  if not found:
    return []
  at, weights = found.pop('timesteps'), found.pop('weights')
  each = {name: list(zip(at, bits, strict=True)) for name, bits in found.items()}
  sums = {
    name: list(zip(at, np.cumsum(np.multiply(bits, weights)).tolist(), strict=True))
    for name, bits in found.items()
  }
  return [
    (title, line_chart(lines, title=title, xlabel='timestep', ylabel='bits per dimension',
                       log_y=True)) for title, lines in (
      ('bits per dimension of each step', each), ('bits per dimension of the steps up to it', sums)
    )
  ]


def _settling(scores: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> str:
  """How much pictures change from one number of steps to the next, and the pictures."""
  found = scores.get('settling')
  if not found:
    return ''
  title = 'root mean square change to the next number of steps'
  lines = {name: list(map(tuple, points)) for name, points in found['changes'].items()}
  drawn = line_chart(lines, title=title, xlabel='steps', ylabel='levels of 255', log_y=True)
  chart = page.chart_grid([(title, drawn)])
  rows = page.strip([
    ([(image, f'{name}, {steps} steps') for image, steps in zip(row, found['steps'], strict=True)],
     page.escape(name)) for name, group in images.items() for row in group
  ])
  note = ('The same noise at the start, in more and more steps from the top down. What is '
          'deterministic settles; ancestral samples are others each time.')
  return page.section('settling', 'Steps', note, chart + rows)


def _cell(value: Any, interval: Mapping[str, float] | None) -> str:
  text = page.number(value)
  if interval is None:
    return text
  return f'{text}\n[{page.number(interval["low"])}, {page.number(interval["high"])}]'


def _measured(scores: Mapping[str, Any]) -> str:
  return page.section(
    'measured', 'What they were measured on', '', page.bullets(scores.get('measured', ()))
  )


def _warnings(scores: Mapping[str, Any]) -> str:
  return page.section('beware', 'What to beware of', '', page.bullets(scores.get('warnings', ())))


def _clouds(clouds: Mapping[str, PrincipalComponents]) -> str:
  charts = [(name, _scatter(name, cloud)) for name, cloud in clouds.items()]
  note = ('Features on the two axes along which the reference varies most; in percent, how much of '
          'the reference’s variance is along an axis, then of the samples’.')
  return page.section('components', 'Leading principal components', note, page.chart_grid(charts))


def _scatter(name: str, cloud: PrincipalComponents) -> str:
  axis = lambda i: (f'axis {i + 1}: {100 * cloud.reference_fraction[i]:.1f} %, '
                    f'{100 * cloud.samples_fraction[i]:.1f} %')
  some = lambda points: np.asarray(points)[:: -(-len(points) // MOST_POINTS)]
  return cloud_chart(
    {'reference': some(cloud.reference), 'samples': some(cloud.samples)},
    title=f'{name}: samples over the reference', xlabel=axis(0), ylabel=axis(1),
  )


def _pairs(pairs: Sequence[Pair]) -> str:
  note = ('Above, the samples that are most like an image of the reference; below, that image, and '
          'the cosine of their features. Copies of images of the reference would be here.')
  return page.section('nearest', 'Nearest in the reference', note, page.strip([
    ([(pair.sample, pair.name or 'sample'), (pair.reference, 'its nearest in the reference')],
     f'{page.escape(pair.name)} {pair.similarity:.3f}') for pair in pairs
  ]))


def _reconstructions(which: str, pairs: Sequence[Pair]) -> str:
  note = 'Above, the originals; below, what comes back, with its PSNR.'
  heading = f'{which.capitalize()} reconstructions'
  return page.section(f'{which}_reconstructions', heading, note, page.strip([
    ([(pair.reference, 'original'), (pair.sample, 'reconstruction')],
     f'{page.escape(pair.name)}: {pair.similarity:.1f} dB') for pair in pairs
  ]))


def _prompts(name: str, heading: str, prompts: Sequence[Prompt]) -> str:
  return page.section(name, heading, 'By the CLIP score of picture and caption.', page.strip([
    ([(prompt.sample, prompt.caption)], f'{page.escape(prompt.caption)}<br>{prompt.score:.1f}')
    for prompt in prompts
  ]))


def _classes(classes: Sequence[ClassRow]) -> str:
  if not classes:
    return ''
  columns = list(classes[0].accuracies)
  rows = [
    (row.name, [str(row.count), *(page.number(row.accuracies[c]) for c in columns)])
    for row in classes
  ]
  note = 'The classes that are least often recognised, how many images there are of each, and the '\
         'fraction that the classifier finds to be of it.'
  body = page.number_table(['', 'images', *columns], rows)
  return page.section('classes', 'Classes that come out worst', note, body)


def _settings(scores: Mapping[str, Any]) -> str:
  settings = scores.get('settings')
  if not settings:
    return ''
  body = page.details('All settings', page.settings_table(dict(settings)))
  return page.section('settings', 'Settings', '', body)


def print_table(scores: Mapping[str, Any]) -> None:
  """Print metrics as rows and columns as they are, or, of many columns, the other way round."""
  columns = columns_of(scores)
  metrics = list(dict.fromkeys(metric for name in columns for metric in scores[name]))
  value = lambda column, metric: scores[column].get(metric)
  if len(columns) > MOST_COLUMNS:
    columns, metrics, value = metrics, columns, lambda metric, column: scores[column].get(metric)
  width = max(map(len, metrics), default=0)
  print(' ' * width + ''.join(f' {name:>13}' for name in columns))
  for row in metrics:
    cells = (value(column, row) for column in columns)
    print(f'{row:<{width}}' + ''.join(' ' * 14 if c is None else f' {c:13.4g}' for c in cells))


def examples(comparison: Comparison, found: Found) -> dict[str, Any]:
  """Return what a page shows of the first column, as `write_evaluation_page` takes it."""
  first, reference = found.first, comparison.pictured_reference
  pictured, column, shown = found.pictured[first], found.columns[first], {}
  if reference is not None:
    shown = {'clouds': clouds(pictured.features, reference.features)}
    if comparison.reference.own:
      shown['reconstructions'] = reconstructions(*pictured, reference.thumbnails)
    else:
      shown['pairs'] = near_copies(*pictured, *reference)
  if 'class_accuracy' in comparison.metrics:
    (name, known), = comparison.classifiers.items()
    shown['classes'] = worst_classes({
      one: (found.pictured[one].features, comparison.labels(found.columns[one])[name])
      for one in (first, 'untrained', 'real') if one in found.columns
    }, name, known)
  if texts := comparison.captions(column):
    features, rows = next(iter(texts.items()))
    shown |= best_and_worst(*pictured, features, rows, column.captions)
  return shown | {'first': first_of(*pictured, column.captions or ())}


def first_of(samples: Features, pictures: Thumbnails, captions: Sequence[str]) -> list[Shown]:
  """Return the samples that come first, with their captions where those are known."""
  rows = sorted(map(int, samples.rows))[:FIRST]
  name = lambda row: captions[row] if row < len(captions) else ''
  return [Shown(pictures[row], row, name(row)) for row in rows if pictures[row] is not None]


PAIRS, PROMPTS, CLASSES, FIRST = 12, 12, 5, 16
MOST_IN_CLOUD = 5000


def clouds(samples: Features, reference: Features) -> dict[str, PrincipalComponents]:
  """Both sets on the reference's leading axes, for each kind of features, evenly thinned."""
  some = lambda values: values[:: -(-len(values) // MOST_IN_CLOUD)]
  return {
    name: principal_components(some(reference.columns[name]), some(values), k=2)
    for name, values in samples.columns.items() if values.shape[1] >= 2
  }


def near_copies(
  samples: Features, pictures: Thumbnails, reference: Features, reference_pictures: Thumbnails
) -> list[Pair]:
  """The samples most like a reference image, by the first features; none without pictures."""
  if pictures[0] is None or reference_pictures[0] is None:
    return []
  first = next(iter(samples.columns))
  near = nearest_neighbours(samples.columns[first], reference.columns[first])
  pairs = []
  for row in np.argsort(-near.similarities[:, 0], kind='stable')[:PAIRS]:
    own, other = int(samples.rows[row]), int(reference.rows[near.indices[row, 0]])
    both = pictures[own], reference_pictures[other]
    if all(picture is not None for picture in both):
      pairs.append(Pair(*both, float(near.similarities[row, 0]), f'image {own}'))
  return pairs


def best_and_worst(
  samples: Features, pictures: Thumbnails, column: str, texts: np.ndarray, captions: Sequence[str]
) -> dict[str, Any]:
  """The samples that fit their captions best and worst, by CLIP score; texts: [total d]."""
  each = clip_score_of_each(samples.columns[column], texts[samples.rows])
  order = np.argsort(each, kind='stable')

  def shown(rows) -> list[Prompt]:
    found = [(pictures[int(samples.rows[row])], row) for row in rows]
    return [
      Prompt(picture, captions[int(samples.rows[row])], float(each[row]))
      for picture, row in found if picture is not None
    ]

  return {'best': shown(order[::-1][:PROMPTS]), 'worst': shown(order[:PROMPTS])}


def reconstructions(
  samples: Features, pictures: Thumbnails, originals: Thumbnails
) -> dict[str, list[Pair]]:
  """Return those nearest to their originals and those farthest, by PSNR."""
  each = samples.each.get('psnr')
  if each is None:
    return {}
  order = np.argsort(each, kind='stable')

  def shown(rows) -> list[Pair]:
    found = [(int(samples.rows[row]), float(each[row])) for row in rows]
    pairs = [(pictures[number], originals[number], number, value) for number, value in found]
    return [
      Pair(picture, original, value, f'image {number}')
      for picture, original, number, value in pairs if picture is not None and original is not None
    ]

  return {'best': shown(order[::-1][:PAIRS]), 'worst': shown(order[:PAIRS])}


def worst_classes(
  columns: Mapping[str, tuple[Features, np.ndarray]], logits: str, classes: Sequence[str]
) -> list[ClassRow]:
  """The classes that the first column has least often right.

  columns: features, and wanted classes [total]. logits: name of the features that are logits.
  """
  hits, true = {}, {}
  for name, (features, numbers) in columns.items():
    true[name] = numbers[features.rows]
    hits[name] = class_hits(features.columns[logits], true[name])
  first = next(iter(columns))
  rows = [
    ClassRow(classes[k], int((true[first] == k).sum()), {
      name: float(hits[name][true[name] == k].mean()) if (true[name] == k).any() else float('nan')
      for name in columns
    })
    for k in np.unique(true[first])
  ]
  return sorted(rows, key=lambda row: row.accuracies[first])[:CLASSES]
