"""Charts of a sweep: a distance against the CLIP score, network calls, or the half-life of EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.viz.plot import COLOURS, EDGE, Line, Scale, plot
from diffusion_jax.viz.scores import metric_unit, metric_words

MOST_LABELLED = 30
"""Points in a chart whose values are written beside them."""


class Labelled(NamedTuple):
  """A point and its label within its line."""

  x: float
  y: float
  text: str


class Chart(NamedTuple):
  """A chart: the metric or setting across it, and the setting along which points are joined."""

  x: str
  xlabel: str
  along: str
  log_x: bool = False


CHARTS = (
  Chart('clip_score', 'CLIP score', 'guidance'),
  Chart('network_calls', 'network calls', 'steps', log_x=True),
  Chart('ema_halflife_images', "half-life of the weights' average, images",
        'ema_halflife_images', log_x=True),
)


def label(combination: Mapping[str, Any]) -> str:
  """'guidance=4 steps=20'."""
  return ' '.join(f'{name}={short(value)}' for name, value in combination.items())


def short(value: Any) -> str:
  """Numbers without needless digits, but with all that tell them apart."""
  brief = f'{value:g}' if isinstance(value, float) else ''
  return brief if brief and float(brief) == value else str(value)


def sweep_charts(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return (heading, chart) of each chart that the sweep has metrics for; none without a sweep."""
  swept = scores.get('sweep', {})
  points = [
    {**scores[name], **point['combination'], 'network_calls': point['network_calls'],
     'combination': point['combination']} for name, point in swept.items()
  ]
  if not points:
    return []
  found = []
  distances = [name for name in points[0] if name in ('fid', 'sfid') or name.startswith('fd_')]
  for chart in CHARTS:
    for y in distances:
      known = [p for p in points if p.get(chart.x) is not None and (p[chart.x] or not chart.log_x)]
      if len({p[chart.x] for p in known}) > 1:
        drawn = _drawn(_lines(known, chart, y), chart, y, f'{y} against {chart.xlabel}')
        found.append((f'{metric_words(y)} against {chart.xlabel}', drawn))
  return found


def _lines(points: Sequence[Mapping[str, Any]], chart: Chart, y: str) -> dict[str, list[Labelled]]:
  """Points that differ in one setting alone, in its order, by the label of the others."""
  found: dict[str, list[Mapping[str, Any]]] = {}
  for point in points:
    shared = {k: v for k, v in point['combination'].items() if k != chart.along}
    found.setdefault(label(shared), []).append(point)
  text = lambda p: short(p['combination'][chart.along]) if chart.along in p['combination'] else ''
  return {
    name: [
      Labelled(p[chart.x], p[y], text(p))
      for p in sorted(group, key=lambda p: p['combination'].get(chart.along, 0))
    ] for name, group in found.items()
  }


def _drawn(lines: Mapping[str, Sequence[Labelled]], chart: Chart, y: str, title: str) -> str:
  found = [point for points in lines.values() for point in points]
  few, along = len(found) <= MOST_LABELLED, chart.along.replace('_', ' ')
  drawn = []
  for number, (name, points) in enumerate(lines.items()):
    texts = [f'{along} {p.text}' if p.text else '' for p in points]
    drawn.append(Line(
      name or 'all', [(p.x, p.y) for p in points], ('', 'dashed')[number // COLOURS % 2],
      texts=texts, tags=[p.text for p in points] if few else (),
    ))
  return plot(
    drawn, Scale.of([p.x for p in found], chart.log_x, EDGE), Scale.of([p.y for p in found],
                                                                       room=EDGE),
    title=title, xlabel=chart.xlabel, ylabel=f'{y}: {metric_unit(y)}', apart=True,
  )
