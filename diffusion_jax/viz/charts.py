"""Charts as inline SVG: metrics over steps, the loss over the diffusion time, noise schedules.

Text, axes and grid are `currentColor` on a transparent ground, for light and dark pages; series use
the Okabe-Ito palette, distinct to colour-blind readers. No global state, no window system. The same
data gives the same bytes; ids differ between charts, which may be on one page.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito 2008, the blue lightened for dark pages.
PALETTE = ('#2A8FD0', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#8C8C8C')
# Drawn instead of currentColor, which matplotlib does not know, and replaced in the SVG.
INK = '#010203'
STYLE = {
  'svg.hashsalt': 'diffusion_jax',
  'svg.fonttype': 'none',
  'font.size': 9,
  'text.color': INK,
  'text.parse_math': False,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.formatter.useoffset': False,
  'xtick.color': INK,
  'ytick.color': INK,
}
"""For `matplotlib.rc_context`, around all drawing."""

WIDTH = 4.8
"""Inches: about a phone's width in CSS pixels, so that text is not scaled below its size."""
Point = tuple[float, float | None]
_POINTS = 600
"""Most points of a line that is drawn."""
_MAX_LOG_SNR = 30.0


def empty_figure(height: float, width: float = WIDTH) -> Figure:
  """Return a transparent figure without axes; height and width in inches."""
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasSVG(figure)
  figure.patch.set_visible(False)
  return figure


def plain_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
  """Give axes the look of all charts: a line below, a faint grid, no ticks."""
  axes.patch.set_visible(False)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_alpha(0.4)
  axes.grid(axis='y', color=INK, alpha=0.14, linewidth=0.7)
  axes.tick_params(length=0, which='both')
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)


def log_axis(axis: Axis, subs: tuple[float, ...] = (1,)) -> None:
  """Give an axis that is logarithmic ticks at `subs` times powers of ten, with plain labels."""
  axis.set_major_locator(LogLocator(subs=subs, numticks=8))
  axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
  axis.set_minor_locator(NullLocator())


def _plain_number(value: float) -> str:
  """0.001 as it is, 0.0001 as 10⁻⁴."""
  digits, _, power = f'{value:.0e}'.partition('e')
  if abs(int(power)) < 4 or digits != '1':
    return f'{value:g}'
  return '10' + str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))


def visible(name: str) -> str:
  """Return the name for a legend, from which a leading underscore would hide it."""
  return f' {name}' if name.startswith('_') else name


def notes(axes: Axes, drawn: int, left_out: int) -> None:
  """Say in words what the lines cannot show."""
  if not drawn:
    axes.set_yticks([])
    axes.text(0.5, 0.5, 'no values to draw', ha='center', va='center', transform=axes.transAxes)
  if left_out:
    text = f'{left_out} value{"s" if left_out > 1 else ""} missing or not finite, left out'
    axes.annotate(text, (1, 1), xycoords='axes fraction', ha='right', va='bottom', fontsize=8)


def legend(axes: Axes) -> None:
  """Add a legend inside the axes, where it hides least."""
  axes.legend(loc='best', frameon=False, fontsize=8, handlelength=1.4)


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
  """Add a legend below the whole figure: for many lines, or several axes of the same lines."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False,
                fontsize=8, handlelength=2.8)


def render(figure: Figure, title: str) -> str:
  """A figure as a scalable <svg> with ids of its own; title: for screen readers, not drawn."""
  buffer = io.StringIO()
  # A date would make every file differ.
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :].strip()
  svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg, flags=re.DOTALL)
  for size in ('width', 'height'):
    svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r'\1', svg, count=1)
  svg = svg.replace('>*{', '>.chart *{').replace(INK, 'currentColor')
  own = 'c' + hashlib.sha256(f'{title}\0{svg}'.encode()).hexdigest()[:10]
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{own}-', svg)
  label = html.escape(title, quote=True)
  return svg.replace('<svg', f'<svg class="chart" role="img" aria-label="{label}"', 1)


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
  """Draw one line per series of (step, value).

  Args:
    series: points by name; values that are None, NaN, infinite or beyond 1e30 interrupt the line
      and are counted in a note. Without series the empty chart says so.
    smoothing: weight in [0, 1) of a neighbouring point, as in `smooth`; above 0 values are faint
      and their average strong, in series of at least 3 / (1 - smoothing) points.
    log_y: logarithmic, unless a value is 0 or below or they span less than a factor of 3.
    means: what is smoothed, where the points are the extremes of stretches of a longer series.
    left_out: how many values interrupt the line, where the points do not show all of them.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(xlabel, ylabel)
    cleaned = {name: _finite(points) for name, points in series.items()}
    values = [v for points in cleaned.values() for _, v in points if not math.isnan(v)]
    for number, (name, points) in enumerate(cleaned.items()):
      averages = smooth((means or series)[name], smoothing) if smoothing > 0 else []
      _line(axes, points, name, PALETTE[number % len(PALETTE)], averages, smoothing)
    if log_y and values and min(values) > 0:
      _log_scale(axes, values)
    gaps = sum(map(len, cleaned.values())) - len(values) if left_out is None else left_out
    notes(axes, len(values), gaps)
    if len(series) > 1:
      legend(axes)
    return render(figure, title)


def timestep_chart(
  records: Sequence[tuple[float, Sequence[float | None]]], *, title: str, lines: int = 5
) -> str:
  """Draw the loss over the diffusion time, a line for each of some recorded steps.

  records: (step, losses over equal ranges of t in [0, T)), in order; None or NaN where no example
  fell into a range. lines: how many, spread evenly with the first and the last.
  """
  chosen = spread(records, lines)
  with matplotlib.rc_context(STYLE):
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
    notes(axes, len(seen), 0)
    if len(chosen) > 1:
      legend(axes)
    return render(figure, title)


def histogram_chart(
  values: Mapping[str, np.ndarray], *, title: str, xlabel: str, ratio: bool = False
) -> str:
  """How often values occur, as fractions of those of each name, in 40 equal ranges.

  ratio: ranges are equal on a logarithmic axis. What is not finite, or for a ratio not above 0, is
  left out.
  """
  good = {name: each[np.isfinite(each) & ((each > 0) | (not ratio))]
          for name, each in values.items()}
  drawn = np.concatenate([np.zeros(0), *good.values()])
  low, high = (float(f(drawn)) if drawn.size else 1.0 for f in (np.min, np.max))
  low, high = (low, high) if low < high else (low * 0.9, high * 1.1 + 1e-9)
  edges = np.geomspace(low, high, 41) if ratio else np.linspace(low, high, 41)
  with matplotlib.rc_context(STYLE):
    figure, axes = _figure(xlabel, 'fraction')
    for number, (name, each) in enumerate(good.items()):
      counts, _ = np.histogram(np.clip(each, low, high), edges)
      color = PALETTE[number % len(PALETTE)]
      axes.stairs(counts / max(counts.sum(), 1), edges, color=color, label=visible(name))
    if ratio:
      axes.set_xscale('log')
      log_axis(axes.xaxis, (1, 2, 5))
    notes(axes, drawn.size, sum(each.size for each in values.values()) - drawn.size)
    if len(good) > 1:
      legend(axes)
    return render(figure, title)


def spread(items: Sequence, count: int) -> list:
  """Return at most `count` items, evenly spread, with the last and the first."""
  if len(items) <= count:
    return list(items)
  if count == 1:
    return [items[-1]]
  return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def smooth(points: Sequence[Point], weight: float) -> list[tuple[float, float]]:
  """Average each value with those on both sides, weighted by weight^distance; NaN is left out."""
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
  """Return about `limit` points at most: of each stretch the extremes and a gap, so spikes stay."""
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
  figure = empty_figure(2.5)
  axes = figure.add_subplot()
  plain_axes(axes, xlabel, ylabel)
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
            marker='o' if alone else None, markersize=3.5, label=visible(name),
            solid_joinstyle='round')


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
  """Logarithmic values with plain labels; left linear where the values span less than 3 times."""
  ratio = max(values) / min(values)
  if ratio < 3:
    return
  axes.set_yscale('log')
  log_axis(axes.yaxis, (1, 2, 5) if ratio < 100 else (1,))



def schedule_chart(times: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, *, title: str) -> str:
  """Draw alpha, solid, sigma, dashed, and below them the log-SNR against time, [n] each.

  Sigmas above 3 make their axis logarithmic. Log-SNRs beyond +-30 interrupt their line.
  """
  line = dict(color=PALETTE[0], linewidth=1.6)
  with matplotlib.rc_context(STYLE):
    figure = empty_figure(4.4)
    above, below = figure.subplots(2, 1, sharex=True)
    plain_axes(above, '', 'α solid, σ dashed')
    plain_axes(below, 't', 'log-SNR')
    above.plot(times, alpha, **line)
    above.plot(times, sigma, linestyle='--', **line)
    below.plot(times, log_snr(alpha, sigma), **line)
    if np.max(sigma) > 3:
      above.set_yscale('log')
      log_axis(above.yaxis)
    return render(figure, title)


def log_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
  """Return ln(alpha^2 / sigma^2), NaN beyond +-30."""
  with np.errstate(divide='ignore'):
    value = 2 * (np.log(alpha) - np.log(sigma))
  return np.where(np.abs(value) > _MAX_LOG_SNR, np.nan, value)
