"""Charts of pages: metrics over steps, the loss over the diffusion time, noise schedules.

Each returns HTML for `page.chart_grid`; `viz.plot` draws. No global state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from diffusion_jax.viz.plot import EDGE, MOST_DRAWN, Line, Scale, plot

Point = tuple[float, float | None]
STEP = 'step'
NO_UNIT = 'no unit'
_MAX_LOG_SNR = 30.0
_LARGEST = 1e30


def line_chart(
  series: Mapping[str, Sequence[Point]],
  *,
  title: str,
  xlabel: str = STEP,
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
    ylabel: the unit of values.
    smoothing: weight in [0, 1) of a neighbouring point, as in `smooth`; above 0 values are faint
      and their average strong, in series of at least 3 / (1 - smoothing) points.
    log_y: logarithmic, unless a value is 0 or below or they span less than a factor of 3.
    means: what is smoothed, where the points are the extremes of stretches of a longer series.
    left_out: how many values interrupt the line, where the points do not show all of them.
  """
  cleaned = {name: _finite(points) for name, points in series.items()}
  drawn = [_line(name, points, _finite((means or series)[name]), smoothing)
           for name, points in cleaned.items()]
  values = [v for points in cleaned.values() for _, v in points if not math.isnan(v)]
  gaps = sum(map(len, cleaned.values())) - len(values) if left_out is None else left_out
  steps = [step for points in cleaned.values() for step, _ in points]
  return plot(
    drawn, Scale.of(steps), Scale.of(values, log_y and _is_wide(values, 3), EDGE), title=title,
    xlabel=xlabel, ylabel=ylabel or NO_UNIT, note=notes(len(values), gaps),
  )


def timestep_chart(
  records: Sequence[tuple[float, Sequence[float | None]]], *, title: str, lines: int = 5
) -> str:
  """Draw the loss over the diffusion time, a line for each of some recorded steps.

  records: (step, losses over equal ranges of t in [0, T)), in order; None or NaN where no example
  fell into a range. lines: how many, spread evenly with the first and the last, which is strongest.
  """
  chosen = spread(records, lines)
  drawn = []
  for number, (step, losses) in enumerate(chosen):
    points = _finite([((i + 0.5) / len(losses), v) for i, v in enumerate(losses)])
    strength = 0.3 + 0.7 * (number + 1) / len(chosen)
    drawn.append(Line(f'step {step:,.0f}', points, colour=0, strength=round(strength, 2)))
  seen = [v for line in drawn for _, v in line.points if not math.isnan(v)]
  return plot(
    drawn, Scale(0, 1), Scale.of(seen, _is_wide(seen, 20), EDGE), title=title,
    xlabel='t / T, clean data at 0, noise at 1', ylabel='mean error, no unit',
    note=notes(len(seen), 0),
  )


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
  lines, highest = [], 0.0
  for name, each in good.items():
    counts, _ = np.histogram(np.clip(each, low, high), edges)
    parts = counts / max(counts.sum(), 1)
    highest = max(highest, float(parts.max()))
    corners = [(x, y) for i, y in enumerate(parts.tolist()) for x in edges[i : i + 2].tolist()]
    middles = np.sqrt(edges[1:] * edges[:-1]) if ratio else (edges[1:] + edges[:-1]) / 2
    said = list(zip(middles.tolist(), parts.tolist(), strict=True))
    lines.append(Line(name, [(low, 0.0), *corners, (high, 0.0)], 'filled', said=said))
  return plot(
    lines, Scale(low, high, ratio), Scale(0.0, 1.05 * highest or 1.0), title=title, xlabel=xlabel,
    ylabel='fraction, 0 to 1',
    note=notes(drawn.size, sum(each.size for each in values.values()) - drawn.size),
  )


def schedule_charts(
  times: np.ndarray, alpha: np.ndarray, sigma: np.ndarray
) -> list[tuple[str, str]]:
  """Return (heading, chart) of alpha and sigma, and of the log-SNR, over time, [n] each.

  Sigmas above 3 make their axis logarithmic. Log-SNRs beyond +-30 interrupt their line.
  """
  over = lambda values: list(zip(times.tolist(), np.asarray(values, float).tolist(), strict=True))
  wide = bool(np.max(sigma) > 3)
  both = [Line('α, of the image', over(np.where(wide & (alpha <= 0), np.nan, alpha))),
          Line('σ, of the noise', over(np.where(wide & (sigma <= 0), np.nan, sigma)), 'dashed')]
  ratio = [Line('log-SNR', over(log_snr(alpha, sigma)))]
  across = 't / T, clean data at 0, noise at 1'
  charts = []
  for heading, lines, unit, log in (
    ('Strength of image and noise', both, 'standard deviations', wide),
    ('Signal to noise', ratio, 'log-SNR, nats', False),
  ):
    values = [v for line in lines for _, v in line.points if not math.isnan(v)]
    chart = plot(lines, Scale.of(times.tolist()), Scale.of(values, log, EDGE), title=heading,
                 xlabel=across, ylabel=unit, note=notes(len(values), 0))
    charts.append((heading, chart))
  return charts


def cloud_chart(
  clouds: Mapping[str, np.ndarray], *, title: str, xlabel: str, ylabel: str
) -> str:
  """Draw points in the plane, [n 2] by name; the first below in grey."""
  points = np.concatenate([np.zeros((0, 2)), *clouds.values()])
  lines = [Line(name, each.tolist(), 'cloud', colour=(5, 0)[number % 2])
           for number, (name, each) in enumerate(clouds.items())]
  return plot(lines, Scale.of(points[:, 0].tolist(), room=EDGE),
              Scale.of(points[:, 1].tolist(), room=EDGE), title=title, xlabel=xlabel,
              ylabel=ylabel)


def notes(drawn: int, left_out: int) -> str:
  """Say in words what the lines cannot show."""
  said = [] if drawn else ['no values to draw']
  if left_out:
    said.append(f'{left_out} value{"s" if left_out > 1 else ""} missing or not finite, left out')
  return '; '.join(said)


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


def thin(
  points: Sequence[tuple[float, float]], limit: int = MOST_DRAWN
) -> list[tuple[float, float]]:
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
  drawable = lambda v: v is not None and math.isfinite(v) and abs(v) < _LARGEST
  return [(step, float(v) if drawable(v) else math.nan) for step, v in points]


def _line(
  name: str, points: list[tuple[float, float]], means: list[tuple[float, float]], smoothing: float
) -> Line:
  averages = smooth(means, smoothing) if smoothing > 0 else []
  if len(averages) * (1 - smoothing) >= 3:
    return Line(name, thin(averages), faint=thin(points), said=means)
  return Line(name, thin(points), said=means)


def _is_wide(values: Sequence[float], ratio: float) -> bool:
  """Return whether a logarithmic axis shows values better."""
  return bool(values) and min(values) > 0 and max(values) >= ratio * min(values)


def log_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
  """Return ln(alpha^2 / sigma^2), NaN beyond +-30."""
  with np.errstate(divide='ignore'):
    value = 2 * (np.log(alpha) - np.log(sigma))
  return np.where(np.abs(value) > _MAX_LOG_SNR, np.nan, value)
