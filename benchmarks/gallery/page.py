"""Pictures with their explanations: a file for each, and one page of them all."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.viz import page

_HEADING = 24.0
_MARGIN = 8.0
_GROUND = """<style>
.chart { color: #24272d; }
.chart text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif !important; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) { .chart { color: #e4e5e8; } .ground { fill: #1d2025; } }
</style>"""


class Picture(NamedTuple):
  """name: of its file; heading: shown above it; svg: rendered; wide: takes a row of the page."""

  name: str
  heading: str
  svg: str
  wide: bool


class Section(NamedTuple):
  """Pictures that one text explains."""

  name: str
  heading: str
  text: str
  pictures: tuple[Picture, ...]


def write_gallery(out: Path, sections: Sequence[Section], title: str) -> list[Path]:
  """Write NAME.svg for each picture and index.html, which needs none of them; returns all paths.

  Raises:
    UserError: `out` cannot be made or written to.
  """
  body = f'<header>\n<h1>{page.escape(title)}</h1>\n</header>\n'
  paths = []
  try:
    out.mkdir(parents=True, exist_ok=True)
    for section in sections:
      for picture in section.pictures:
        paths.append(out / f'{picture.name}.svg')
        paths[-1].write_text(standalone(picture.svg, picture.heading), encoding='utf-8')
      body += page.section(section.name, section.heading, section.text, _cards(section.pictures))
    paths.append(out / 'index.html')
    paths[-1].write_text(page.page(title, body), encoding='utf-8')
  except OSError as error:
    raise UserError(f'{out} cannot be written ({error.strerror}); choose another --out.') from error
  return paths


def _cards(pictures: Sequence[Picture]) -> str:
  """Wide pictures one below the other, then the others side by side."""
  card = lambda picture: (picture.heading, _inline(picture.svg))
  wide = [page.chart_grid([card(picture)], wide=True) for picture in pictures if picture.wide]
  return '\n'.join(wide) + page.chart_grid([card(p) for p in pictures if not p.wide])


def _inline(svg: str) -> str:
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
