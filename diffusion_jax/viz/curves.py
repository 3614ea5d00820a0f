"""Line charts of a run, as inline SVG: metrics over steps, the loss over the diffusion time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from diffusion_jax.viz import svg
from diffusion_jax.viz.svg import PALETTE

Point = tuple[float, float | None]

_POINTS = 600


def line_chart(
  series: Mapping[str, Sequence[Point]],
  *,
  title: str,
  xlabel: str = 'step',
  ylabel: str = '',
  smoothing: float = 0.0,
  log_y: bool = False,
  means: Mapping[str, Sequence[Point]] | None = None,
  left_out: int | None = None,
) -> str:
  """Draws one line per series of (step, value) and returns the chart as an SVG string.

  Args:
    series: points by name; values that are None, NaN, infinite or beyond 1e30 interrupt the line
      and are counted in a note. None at all is drawn as an empty chart that says so.
    title: what is shown, read out by screen readers; not drawn.
    smoothing: weight in [0, 1) of a neighbouring point, as in `smooth`; above 0 the values are
      drawn faint and their average strong, in series of at least 3 / (1 - smoothing) points.
    log_y: logarithmic values, unless one is 0 or below or they span less than a factor of 3.
    means: what is smoothed, where the points are the extremes of stretches of a longer series.
    left_out: how many values interrupt the line, where the points do not show all of them.
  """
  with matplotlib.rc_context(svg.STYLE):
    figure, axes = _figure(xlabel, ylabel)
    cleaned = {name: _finite(points) for name, points in series.items()}
    values = [v for points in cleaned.values() for _, v in points if not math.isnan(v)]
    for number, (name, points) in enumerate(cleaned.items()):
      averages = smooth((means or series)[name], smoothing) if smoothing > 0 else []
      _line(axes, points, name, PALETTE[number % len(PALETTE)], averages, smoothing)
    if log_y and values and min(values) > 0:
      _log_scale(axes, values)
    gaps = sum(map(len, cleaned.values())) - len(values) if left_out is None else left_out
    svg.notes(axes, len(values), gaps)
    if len(series) > 1:
      svg.legend(axes)
    return svg.render(figure, title)


def timestep_chart(
  records: Sequence[tuple[float, Sequence[float | None]]], *, title: str, lines: int = 5
) -> str:
  """Draws the loss over the diffusion time, one line per recorded step, and returns an SVG string.

  Args:
    records: (step, losses over equal ranges of t in [0, T)), in order of the step; None or NaN
      where no example fell into a range.
    title: as in `line_chart`.
    lines: how many records are drawn, spread evenly with the first and the last.
  """
  chosen = spread(records, lines)
  with matplotlib.rc_context(svg.STYLE):
    figure, axes = _figure('t / T', '')
    axes.set_xlim(0, 1)
    seen, missing = [], 0
    colours = matplotlib.colormaps['plasma']
    for number, (step, losses) in enumerate(chosen):
      points = _finite([((i + 0.5) / len(losses), v) for i, v in enumerate(losses)])
      finite = [v for _, v in points if not math.isnan(v)]
      seen, missing = seen + finite, missing + len(points) - len(finite)
      colour = colours(0.8 - 0.38 * number / max(len(chosen) - 1, 1))
      axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, marker='o',
                markersize=3, linewidth=1.6, label=f'step {step:,.0f}')
    if seen and min(seen) > 0 and max(seen) > 20 * min(seen):
      _log_scale(axes, seen)
    svg.notes(axes, len(seen), 0)
    if len(chosen) > 1:
      svg.legend(axes)
    return svg.render(figure, title)


def spread(items: Sequence, count: int) -> list:
  """At most `count` items, evenly spread over the sequence, always with the last and the first."""
  if len(items) <= count:
    return list(items)
  if count == 1:
    return [items[-1]]
  return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def smooth(points: Sequence[Point], weight: float) -> list[tuple[float, float]]:
  """Averages each value with those around it, weighted by weight^distance; NaN is left out.

  Both sides count, so that the average does not lag behind a falling loss.
  """
  known = [(s, v) for s, v in points if v is not None and math.isfinite(v)]
  values = [v for _, v in known]
  ones = [1.0] * len(values)
  totals, masses = _decaying_sums(values, weight), _decaying_sums(ones, weight)
  return [(s, t / m) for (s, _), t, m in zip(known, totals, masses, strict=True)]


def _decaying_sums(values: list[float], weight: float) -> list[float]:
  """sum_j weight^|i-j| values[j] for each i, in one pass each way."""
  decay = lambda total, value: weight * total + value
  forward = itertools.accumulate(values, decay)
  backward = [*itertools.accumulate(reversed(values), decay)][::-1]
  return [f + b - v for f, b, v in zip(forward, backward, values, strict=True)]


def thin(points: Sequence[tuple[float, float]], limit: int = _POINTS) -> list[tuple[float, float]]:
  """At most about `limit` points, keeping the extremes (and gaps) of each stretch: spikes stay."""
  if len(points) <= limit:
    return list(points)
  size = math.ceil(len(points) / (limit // 3))
  kept = []
  for start in range(0, len(points), size):
    stretch = range(start, min(start + size, len(points)))
    gaps = [i for i in stretch if math.isnan(points[i][1])][:1]
    finite = [i for i in stretch if not math.isnan(points[i][1])]
    ends = [f(finite, key=lambda i: points[i][1]) for f in (min, max)] if finite else []
    kept += sorted({*gaps, *ends})
  return [points[i] for i in kept]


def _finite(points: Sequence[Point]) -> list[tuple[float, float]]:
  """Values that cannot be drawn become NaN, which interrupts the line."""
  drawable = lambda v: v is not None and math.isfinite(v) and abs(v) < 1e30
  return [(step, float(v) if drawable(v) else math.nan) for step, v in points]


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
  figure = svg.empty_figure(2.5)
  axes = figure.add_subplot()
  svg.plain_axes(axes, xlabel, ylabel)
  axes.xaxis.set_major_locator(MaxNLocator(6))
  if xlabel == 'step':
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
  return figure, axes


def _line(
  axes: Axes, points: list[tuple[float, float]], name: str, colour: str,
  average: list[tuple[float, float]], smoothing: float,
) -> None:
  strong, faint = (average, points) if len(average) * (1 - smoothing) >= 3 else (points, [])
  if faint:
    axes.plot(*zip(*thin(faint), strict=True), color=colour, alpha=0.4, linewidth=0.9)
  alone = sum(not math.isnan(v) for _, v in strong) <= 20
  axes.plot(*zip(*thin(strong), strict=True) if strong else ([], []), color=colour, linewidth=1.8,
            marker='o' if alone else None, markersize=3.5, label=svg.visible(name),
            solid_joinstyle='round')


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
  """Logarithmic values with plain labels; left linear where the values span less than 3 times."""
  ratio = max(values) / min(values)
  if ratio < 3:
    return
  axes.set_yscale('log')
  svg.log_axis(axes.yaxis, (1, 2, 5) if ratio < 100 else (1,))
