"""Pictures with their explanations: a file for each, and one page of them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.viz import page
from diffusion_jax.viz.charts import inline, standalone


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
  """Writes NAME.svg for each picture and index.html, which needs none of them; returns all paths.

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
  card = lambda picture: (picture.heading, inline(picture.svg))
  wide = [page.chart_grid([card(picture)], wide=True) for picture in pictures if picture.wide]
  return '\n'.join(wide) + page.chart_grid([card(p) for p in pictures if not p.wide])
