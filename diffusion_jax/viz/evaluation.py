"""One self-contained HTML page about an evaluation: figures, warnings, pictures of both sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from diffusion_jax.files import atomic_write
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import (
  PALETTE,
  empty_figure,
  inline,
  legend,
  line_chart,
  plain_axes,
  render,
)
from diffusion_jax.viz.sweep import sweep_charts

MOST_POINTS = 1000
"""Of a set in a scatter plot; more make the page large and show nothing else."""
THUMBNAIL = 128
BESIDE = ('intervals', 'measured', 'warnings', 'settings', 'sweep', 'history')
"""What stands beside columns of figures."""
MOST_COLUMNS = 4
"""More are shown as rows."""
SWEPT = ('Each point is a combination. Network calls are those for one picture, guided steps count '
         'twice.')


class Cloud(NamedTuple):
  """Both sets of features on the reference's leading axes. reference, samples: [n 2]; shares: of
  the reference's and of the samples' variance that each axis holds, [2]."""

  name: str
  reference: Float[np.ndarray, 'n 2']
  samples: Float[np.ndarray, 'm 2']
  reference_share: Float[np.ndarray, '2']
  samples_share: Float[np.ndarray, '2']


class Pair(NamedTuple):
  """A sample beside the reference image that is most like it; similarity: a cosine."""

  sample: UInt8[np.ndarray, 'h w 3']
  reference: UInt8[np.ndarray, 'h w 3']
  similarity: float
  name: str = ''


class Prompt(NamedTuple):
  """A sample with its caption and their CLIP score."""

  sample: UInt8[np.ndarray, 'h w 3']
  caption: str
  score: float


class ClassRow(NamedTuple):
  """How often images of a class are found to be of it, by column; count: in the first column."""

  name: str
  count: int
  accuracies: Mapping[str, float]


def write_evaluation_page(
  path: Path, scores: Mapping[str, Any], *, clouds: Sequence[Cloud] = (),
  pairs: Sequence[Pair] = (), best: Sequence[Prompt] = (), worst: Sequence[Prompt] = (),
  reconstructions: Mapping[str, Sequence[Pair]] | None = None, classes: Sequence[ClassRow] = (),
) -> None:
  """Writes the page; it needs nothing else to be viewed.

  Args:
    scores: columns of figures by name, and 'intervals', 'warnings' and 'settings' beside them; of a
      sweep, 'sweep' says for each column its combination and network calls; 'history' has a line of
      figures for each checkpoint of a run.
    pairs: the samples that are most like a reference image, the most alike first.
    best, worst: the samples that fit their captions best, and worst, those first.
    reconstructions: 'best' and 'worst', each beside its original, similarity the PSNR in dB.
    classes: those that come out worst.
  """
  body = (
    f'<header>\n<h1>{page.escape(path.stem)}</h1>\n'
    f'<p class="muted">{page.escape(_subject(scores))}</p>\n</header>\n'
    + _figures(scores) + _measured(scores) + _warnings(scores) + _classes(classes)
    + _reconstructions('worst', (reconstructions or {}).get('worst', ()))
    + _reconstructions('best', (reconstructions or {}).get('best', ()))
    + page.section('sweep', 'Sweep', SWEPT, page.chart_grid(sweep_charts(scores)))
    + page.section('history', 'Checkpoints', '', page.chart_grid(_history(scores)))
    + _prompts('best', 'Best prompts', best) + _prompts('worst', 'Worst prompts', worst)
    + _clouds(clouds) + _pairs(pairs) + _settings(scores)
  )
  with atomic_write(path) as file:
    file.write(page.page(f'Evaluation · {path.stem}', body).encode())


def figure_columns(scores: Mapping[str, Any]) -> list[str]:
  """The columns of figures among what an evaluation has written."""
  return [name for name in scores if name not in BESIDE]


def _subject(scores: Mapping[str, Any]) -> str:
  settings = scores.get('settings', {})
  return page.plain({k: settings[k] for k in ('images', 'model', 'reference') if k in settings})


def _figures(scores: Mapping[str, Any]) -> str:
  columns, intervals = figure_columns(scores), scores.get('intervals', {})
  metrics = list(dict.fromkeys(metric for column in columns for metric in scores[column]))
  first = scores.get('settings', {}).get('best', columns[0])
  cell = lambda column, metric: _cell(
    scores[column].get(metric), intervals.get(metric) if column == first else None
  )
  note = '95 % confidence intervals in brackets, where there are any.' if intervals else ''
  if len(columns) > MOST_COLUMNS:
    rows = [(column, [cell(column, metric) for metric in metrics]) for column in columns]
    return page.section('figures', 'Figures', note, page.number_table(['', *metrics], rows))
  rows = [(metric, [cell(column, metric) for column in columns]) for metric in metrics]
  own = columns.index(first) if first in columns else None
  return page.section('figures', 'Figures', note, page.number_table(['', *columns], rows, own))


def _history(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
  """A curve over the run's steps for each figure."""
  lines = scores.get('history', [])
  names = dict.fromkeys(name for line in lines for name in line if name != 'step')
  return [
    (name, inline(line_chart({name: [(line['step'], line.get(name)) for line in lines]},
                             title=f'{name} of each checkpoint'))) for name in names
  ]


def _cell(value: Any, interval: Mapping[str, float] | None) -> str:
  text = page.number(value)
  if interval is None:
    return text
  return f'{text} [{page.number(interval["low"])}, {page.number(interval["high"])}]'


def _measured(scores: Mapping[str, Any]) -> str:
  return page.section(
    'measured', 'What they were measured on', '', page.bullets(scores.get('measured', ()))
  )


def _warnings(scores: Mapping[str, Any]) -> str:
  return page.section(
    'beware', 'What to beware of', '', page.bullets(scores.get('warnings', ()))
  )


def _clouds(clouds: Sequence[Cloud]) -> str:
  charts = [(cloud.name, inline(_scatter(cloud))) for cloud in clouds]
  note = ('Features on the two axes along which the reference varies most; in percent, the share '
          'of the reference’s variance along an axis, then that of the samples’.')
  return page.section('components', 'Leading principal components', note, page.chart_grid(charts))


def _scatter(cloud: Cloud) -> str:
  figure = empty_figure(3.4)
  axes = figure.add_subplot()
  label = lambda i: (f'axis {i + 1}: {100 * cloud.reference_share[i]:.1f} %, '
                     f'{100 * cloud.samples_share[i]:.1f} %')
  plain_axes(axes, label(0), label(1))
  for name, points, color, size in (
    ('reference', cloud.reference, '0.6', 2.4), ('samples', cloud.samples, PALETTE[0], 3.6)
  ):
    shown = np.asarray(points)[:: -(-len(points) // MOST_POINTS)]
    axes.plot(*shown.T, 'o', markersize=size, markeredgewidth=0, alpha=0.6, color=color, label=name)
  legend(axes)
  return render(figure, f'{cloud.name}: samples over the reference')


def _pairs(pairs: Sequence[Pair]) -> str:
  figures = ''.join(
    f'<figure>{_picture(pair.sample, pair.name or "sample")}'
    f'{_picture(pair.reference, "its nearest in the reference")}'
    f'<figcaption>{page.escape(pair.name)} {pair.similarity:.3f}</figcaption></figure>\n'
    for pair in pairs
  )
  note = ('Above, the samples that are most like an image of the reference; below, that image, and '
          'the cosine of their features. Copies of images of the reference would be here.')
  body = f'<div class="strip">\n{figures}</div>' if figures else ''
  return page.section('nearest', 'Nearest in the reference', note, body)


def _reconstructions(which: str, pairs: Sequence[Pair]) -> str:
  figures = ''.join(
    f'<figure>{_picture(pair.reference, "original")}{_picture(pair.sample, "reconstruction")}'
    f'<figcaption>{page.escape(pair.name)}: {pair.similarity:.1f} dB</figcaption></figure>\n'
    for pair in pairs
  )
  body = f'<div class="strip">\n{figures}</div>' if figures else ''
  note = 'Above, the originals; below, what comes back, with its PSNR.'
  return page.section(
    f'{which}_reconstructions', f'{which.capitalize()} reconstructions', note, body
  )


def _classes(classes: Sequence[ClassRow]) -> str:
  if not classes:
    return ''
  columns = list(classes[0].accuracies)
  rows = [
    (row.name, [str(row.count), *(page.number(row.accuracies[c]) for c in columns)])
    for row in classes
  ]
  note = 'The classes that are least often recognised, how many images there are of each, and the '\
         'share that the classifier finds to be of it.'
  body = page.number_table(['', 'images', *columns], rows)
  return page.section('classes', 'Classes that come out worst', note, body)


def _prompts(name: str, heading: str, prompts: Sequence[Prompt]) -> str:
  figures = ''.join(
    f'<figure>{_picture(prompt.sample, prompt.caption)}'
    f'<figcaption>{page.escape(prompt.caption)}<br>{prompt.score:.1f}</figcaption></figure>\n'
    for prompt in prompts
  )
  body = f'<div class="strip">\n{figures}</div>' if figures else ''
  return page.section(name, heading, 'By the CLIP score of picture and caption.', body)


def _picture(pixels: np.ndarray, label: str) -> str:
  image = Image.fromarray(pixels)
  image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
  return f'<img src="{page.embed_image(image, 60_000)}" alt="{page.escape(label)}">'


def _settings(scores: Mapping[str, Any]) -> str:
  settings = scores.get('settings')
  if not settings:
    return ''
  body = page.details('All settings', page.settings_table(dict(settings)))
  return page.section('settings', 'Settings', '', body)
