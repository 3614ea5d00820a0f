"""The frame of a chart in a page: scales, ticks, lines as a small SVG, words as HTML.

Lines stretch to any width of the page and words keep their size, without a program. page.js adds
the values under a pointer, and under the keys of a keyboard; page.css the colours. The same data
gives the same text.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

SIDE = 1000
"""The plane of the SVG, in each direction, whatever its size on a screen."""
COLOURS = 6
"""Classes s0, s1 ... of page.css."""
MOST_DRAWN, MOST_HOVERED = 600, 300
"""Most points of a line that is drawn, and of those that say their value."""
EDGE = 0.06
"""Fraction of an axis that usually stays free at each end."""
_TICKS = 5
_SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')

Point = tuple[float, float]


class Line(NamedTuple):
  """A line of a chart.

  points: (x, y), NaN interrupts it. look: classes of page.css: '', 'dashed', 'filled', or 'cloud'
  for points without a line. faint: drawn thin behind it. said: the points that a pointer finds,
  those drawn by default; texts: what else each of these says. tags: written beside the points.
  colour: in place of the line's own. strength: opacity.
  """

  name: str
  points: Sequence[Point]
  look: str = ''
  faint: Sequence[Point] = ()
  said: Sequence[Point] | None = None
  texts: Sequence[str] = ()
  tags: Sequence[str] = ()
  colour: int | None = None
  strength: float = 1.0


class Scale(NamedTuple):
  """Numbers of an axis from low to high; logarithmic with `log`."""

  low: float
  high: float
  log: bool = False

  @classmethod
  def of(cls, values: Sequence[float], log: bool = False, room: float = 0.0) -> Scale:
    """Return the scale of what is finite of these, with a fraction `room` at each end."""
    values = [value for value in values if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
      edge = (high / low) ** room if high > low else 2.0
      return cls(low / edge, high * edge, True)
    edge = room * (high - low) if high > low else (abs(high) or 1.0) / 2
    return cls(low - edge, high + edge)

  def place(self, value: float) -> float:
    """Return where a value lies, from 0 at the low end to 1."""
    low, high = self.low, self.high
    if self.log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5

  def ticks(self) -> list[tuple[float, str]]:
    """Return (place, text) of a few round numbers within."""
    values = _log_ticks(self.low, self.high) if self.log else []
    if len(values) < 2:
      step = _round_step((self.high - self.low) / _TICKS)
      first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
      values = [number * step for number in range(first, last + 1)]
    return [(self.place(value), tick_text(value)) for value in values]


def _log_ticks(low: float, high: float) -> list[float]:
  decades = math.log10(high / low)
  every = max(1, math.ceil(decades / _TICKS))
  factors = (1, 2, 5) if decades < 2 else (1,)
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  values = [factor * 10.0**power for power in range(first, last + 1) if power % every == 0
            for factor in factors]
  return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _round_step(step: float) -> float:
  """The next number up of 1, 2, 2.5 and 5 times powers of ten."""
  power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
  return next(power * factor for factor in (1, 2, 2.5, 5, 10) if step <= power * factor * 1.000001)


def tick_text(value: float) -> str:
  """Return a number of an axis in few letters: 0.25, 12k, 10⁻⁴."""
  size = abs(value)
  if size >= 1e12 or 0 < size < 1e-3:
    return _power(value)
  for least, unit, letter in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e4, 1e3, 'k')):
    if size >= least:
      return f'{value / unit:.4g}{letter}'
  return f'{value:.6g}'


def _power(value: float) -> str:
  digits, _, power = f'{value:.2e}'.partition('e')
  digits, raised = f'{float(digits):g}', f'10{str(int(power)).translate(_SUPERSCRIPTS)}'
  return raised if digits == '1' else f'{digits}·{raised}'


def plot(
  lines: Sequence[Line], x: Scale, y: Scale, *, title: str, xlabel: str, ylabel: str,
  note: str = '', apart: bool = False,
) -> str:
  """Return a chart as HTML.

  title: for screen readers. xlabel, ylabel: what the axes count, in which units. note: what the
  lines cannot show. apart: a pointer finds single points, not all of one x.
  """
  data = {
    'xlabel': xlabel, 'ylabel': ylabel, 'x': list(x), 'y': list(y), 'apart': apart,
    'lines': [{'name': line.name, 'points': _said(line)} for line in lines
              if line.look != 'cloud'],
  }
  label = html.escape(f'{title}: {ylabel} over {xlabel}. {_in_words(lines)}'.strip(), quote=True)
  hidden = html.escape(json.dumps(data, separators=(',', ':'), ensure_ascii=False), quote=True)
  said = f' data-plot="{hidden}"' if any(one['points'] for one in data['lines']) else ''
  xs, ys = x.ticks(), y.ticks()
  grid = ''.join(f'M0 {_down(at)}H{SIDE}' for at, _ in ys)
  across = ''.join(f'<span style="left:{100 * at:.4g}%">{text}</span>' for at, text in xs)
  down = ''.join(f'<span style="top:{100 - 100 * at:.4g}%">{text}</span>' for at, text in ys)
  drawn = ''.join(_drawn(line, number, x, y) for number, line in enumerate(lines))
  tags = ''.join(_tags(line, x, y) for line in lines)
  return (
    f'<div class="plot"><p class="unit">{html.escape(ylabel)}</p>\n'
    f'<div class="frame" role="img" aria-label="{label}"{said}>'
    f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true" '
    f'focusable="false"><path class="grid" d="{grid}"/>{drawn}</svg>\n'
    f'<div class="y" aria-hidden="true">{down}</div>{tags}</div>\n'
    f'<div class="x" aria-hidden="true">{across}</div>'
    f'<p class="across unit">{html.escape(xlabel)}</p>\n'
    + (f'<p class="note">{html.escape(note)}</p>' if note else '') + f'{_legend(lines)}</div>'
  )


def _said(line: Line) -> list[list[Any]]:
  """Points with their texts, of which a pointer says the values."""
  points = line.points if line.said is None else line.said
  texts = line.texts or [''] * len(points)
  said = [
    [_short(px), _short(py), *([text] if text else [])]
    for (px, py), text in zip(points, texts, strict=True) if math.isfinite(py)
  ]
  return said[:: max(1, -(-len(said) // MOST_HOVERED))]


def _short(value: float) -> float | int:
  number = float(f'{value:.7g}')
  return int(number) if number == int(number) and abs(number) < 1e15 else number


def _in_words(lines: Sequence[Line]) -> str:
  """A sentence of the first few lines, for those who cannot see them."""
  sentences = []
  for line in lines[:3]:
    values = [(px, py) for px, py in line.points if math.isfinite(py)]
    if values and line.look != 'cloud':
      (first, low), (last, high) = values[0], values[-1]
      sentences.append(
        f'{line.name}: {len(values)} points, {low:.4g} at {first:.6g} to {high:.4g} at {last:.6g}.'
      )
  return ' '.join(sentences)


def _down(place: float) -> str:
  return f'{SIDE * (1 - place):.1f}'.removesuffix('.0')


def _path(points: Sequence[Point], x: Scale, y: Scale, apart: bool = False) -> str:
  """The commands of a path; each point by itself with `apart`."""
  commands, pen_down = [], False
  for px, py in points:
    if not (math.isfinite(px) and math.isfinite(py)):
      pen_down = False
      continue
    at = f'{f"{SIDE * x.place(px):.1f}".removesuffix(".0")} {_down(y.place(py))}'
    commands.append(f'M{at}h0' if apart else f'{"L" if pen_down else "M"}{at}')
    pen_down = True
  return ''.join(commands)


def _drawn(line: Line, number: int, x: Scale, y: Scale) -> str:
  own = f's{(number if line.colour is None else line.colour) % COLOURS}'
  strength = '' if line.strength == 1 else f' style="stroke-opacity:{line.strength:.2f}"'
  if line.look == 'cloud':
    return f'<path class="{own} cloud" d="{_path(line.points, x, y, apart=True)}"/>'
  drawn = ''
  if line.faint:
    drawn += f'<path class="{own} faint" d="{_path(line.faint, x, y)}"/>'
  if line.points:
    look = f' {line.look}' if line.look else ''
    drawn += f'<path class="{own}{look}"{strength} d="{_path(line.points, x, y)}"/>'
  if line.look != 'filled' and sum(not math.isnan(py) for _, py in line.points) <= 20:
    drawn += f'<path class="{own} dots"{strength} d="{_path(line.points, x, y, apart=True)}"/>'
  return drawn


def _tags(line: Line, x: Scale, y: Scale) -> str:
  return ''.join(
    f'<span class="tag" aria-hidden="true" style="left:{100 * x.place(px):.4g}%;'
    f'top:{100 - 100 * y.place(py):.4g}%">{html.escape(text)}</span>'
    for (px, py), text in zip(line.points, line.tags, strict=False) if text
  )


def _legend(lines: Sequence[Line]) -> str:
  if len(lines) < 2:
    return ''
  items = ''
  for number, line in enumerate(lines):
    own = f's{(number if line.colour is None else line.colour) % COLOURS}'
    look = f' {line.look}' if line.look else ''
    faded = '' if line.strength == 1 else (
      f' style="--c:color-mix(in srgb, var(--{own}) {100 * line.strength:.0f}%, var(--card))"'
    )
    items += f'<li class="{own}{look}"{faded}>{html.escape(line.name)}</li>'
  return f'<ul class="legend">{items}</ul>\n'
