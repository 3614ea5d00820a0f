"""The look of all drawings: figures, axes, legends, and their SVG.

Text, axes and grid are `currentColor` on a transparent ground, for light and dark pages; series use
the Okabe-Ito palette, distinct to colour-blind readers. No global state, no window system. The same
data gives the same bytes; ids differ between drawings, which may be on one page.
"""

from __future__ import annotations

import hashlib
import html
import io
import re

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
