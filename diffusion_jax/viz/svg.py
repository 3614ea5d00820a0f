"""What all charts share: figures without pyplot, their look, and the figure as SVG.

Text, axes and grid are drawn in `currentColor` on a transparent ground, so that one chart is
legible on light and dark pages; series use the Okabe-Ito palette, which colour-blind readers tell
apart. No global state, no window system. The same data gives the same bytes, and ids differ between
charts, so that many can share a page.
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

_HEADING = 24.0
_MARGIN = 8.0
_GROUND = """<style>
.chart { color: #24272d; }
.chart text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif !important; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) { .chart { color: #e4e5e8; } .ground { fill: #1d2025; } }
</style>"""


def empty_figure(height: float, width: float = WIDTH) -> Figure:
  """A transparent figure without axes, in inches."""
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasSVG(figure)
  figure.patch.set_visible(False)
  return figure


def plain_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
  """The look of the line charts: a line below, a faint grid, no ticks."""
  axes.patch.set_visible(False)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_alpha(0.4)
  axes.grid(axis='y', color=INK, alpha=0.14, linewidth=0.7)
  axes.tick_params(length=0, which='both')
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)


def log_axis(axis: Axis, subs: tuple[float, ...] = (1,)) -> None:
  """Gives an axis that is logarithmic ticks at `subs` times powers of ten, with plain labels."""
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
  """The name for a legend, from which a leading underscore would hide it."""
  return f' {name}' if name.startswith('_') else name


def notes(axes: Axes, drawn: int, left_out: int) -> None:
  """Says in words what the lines cannot show."""
  if not drawn:
    axes.set_yticks([])
    axes.text(0.5, 0.5, 'no values to draw', ha='center', va='center', transform=axes.transAxes)
  if left_out:
    text = f'{left_out} value{"s" if left_out > 1 else ""} missing or not finite, left out'
    axes.annotate(text, (1, 1), xycoords='axes fraction', ha='right', va='bottom', fontsize=8)


def legend(axes: Axes) -> None:
  """Inside the axes, where it hides least."""
  axes.legend(loc='best', frameon=False, fontsize=8, handlelength=1.4)


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
  """Below the whole figure: for many lines, or several axes of the same lines."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False,
                fontsize=8, handlelength=2.8)


def render(figure: Figure, title: str) -> str:
  """The figure as an <svg> element: scalable, labelled, with ids of its own.

  Args:
    title: what is shown, read out by screen readers; not drawn.
  """
  buffer = io.StringIO()
  # A date would make every file differ.
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :].strip()
  svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg, flags=re.DOTALL)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', svg, count=1)
  svg = svg.replace('>*{', '>.chart *{').replace(INK, 'currentColor')
  own = 'c' + hashlib.sha256(f'{title}\0{svg}'.encode()).hexdigest()[:10]
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{own}-', svg)
  label = html.escape(title, quote=True)
  return svg.replace('<svg', f'<svg class="chart" role="img" aria-label="{label}"', 1)


def inline(svg: str) -> str:
  """Inside HTML an <svg> needs no namespaces; without them no address is left in the page."""
  return re.sub(r' xmlns(:xlink)?="[^"]*"', '', svg, count=2)


def standalone(svg: str, heading: str) -> str:
  """A rendered chart as a file of its own: a ground in light or dark, a heading, a size.

  Ground and ink change together, with what the reader's system prefers, so that the picture is
  legible on any page that shows it.
  """
  _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', svg)[1].split())
  wide, high = width + 2 * _MARGIN, height + _HEADING + 2 * _MARGIN
  box = f'{-_MARGIN:g} {-_MARGIN - _HEADING:g} {wide:g} {high:g}'
  svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{box}" width="{wide:g}pt" height="{high:g}pt"', svg,
               count=1)
  place = f'x="{-_MARGIN:g}" y="{-_MARGIN - _HEADING:g}"'
  ground = (
    f'{_GROUND}\n<rect class="ground" {place} width="{wide:g}" height="{high:g}" rx="6" '
    f'fill="#ffffff"/>\n<text x="{width / 2:g}" y="-8" text-anchor="middle" font-size="11" '
    f'font-weight="600" fill="currentColor">{html.escape(heading)}</text>\n'
  )
  end = svg.index('>', svg.index('<svg')) + 1
  return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:end]}\n{ground}{svg[end:]}\n'
