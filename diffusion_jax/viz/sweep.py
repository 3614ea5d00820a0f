"""Charts of a sweep: a distance against the CLIP score, network calls, or the half-life of EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

from diffusion_jax.viz import charts
from diffusion_jax.viz.charts import PALETTE

MARKERS = 'osD^vP'
SHORT = 24
"""Characters of a name of which two fit beside each other below a chart."""
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
  """Return (heading, SVG) of each chart that the sweep has metrics for; none without a sweep."""
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
        heading = f'{y} against {chart.xlabel}'
        found.append((heading, _drawn(_lines(known, chart, y), chart, y, heading)))
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


def _drawn(lines: Mapping[str, Sequence[Labelled]], chart: Chart, ylabel: str, title: str) -> str:
  with matplotlib.rc_context(charts.STYLE):
    figure = charts.empty_figure(3.4)
    axes = figure.add_subplot()
    charts.plain_axes(axes, chart.xlabel, ylabel)
    if chart.log_x:
      axes.set_xscale('log')
      charts.log_axis(axes.xaxis, (1, 2, 5))
    labelled = sum(map(len, lines.values())) <= MOST_LABELLED
    for number, (name, points) in enumerate(lines.items()):
      colour = PALETTE[number % len(PALETTE)]
      axes.plot(
        [p.x for p in points], [p.y for p in points], color=colour, linewidth=1.4, markersize=4,
        marker=MARKERS[number // len(PALETTE) % len(MARKERS)], label=charts.visible(name or 'all'),
      )
      for p in points if labelled else ():
        axes.annotate(p.text, (p.x, p.y), xytext=(4, 4), textcoords='offset points', fontsize=7)
    if len(lines) > 1:
      charts.legend_below(figure, axes, columns=1 if max(map(len, lines)) > SHORT else 2)
    return charts.render(figure, title)
