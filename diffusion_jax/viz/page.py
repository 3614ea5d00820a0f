"""The frame of a self-contained HTML page: style, sections, tables and embedded images.

All functions escape their texts; only arguments named `body` are HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_HERE = Path(__file__).parent
STYLE = (_HERE / 'page.css').read_text(encoding='utf-8')
SCRIPT = (_HERE / 'page.js').read_text(encoding='utf-8')
"""The only program of a page: it turns pictures, says values, and follows what is served."""

# The browser itself refuses whatever would come from outside, and any other program.
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = (
  f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
)
LIVE = '<p id="live" class="muted" role="status"></p>'
"""In the body of a page that is served, and asks its server for news."""

THUMBNAIL = 256
"""The longest edge of pictures in a strip."""


def escape(value: Any) -> str:
  """Return text that is safe in an element and in a quoted attribute."""
  return html.escape(str(value), quote=True)


def page(title: str, body: str) -> str:
  """A whole HTML document that loads nothing, and asks for news only with `LIVE` in its body."""
  policy = _POLICY + ("; connect-src 'self'" if LIVE in body else '')
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
    f'<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
  )


def first_screen(words: str, pictures: str) -> str:
  """Return `body` of what a page is of, with its pictures beside it, or below on a phone."""
  two = ' two' if pictures else ''
  return f'<div class="first{two}">\n<section id="about">\n{words}</section>\n{pictures}</div>\n'


class Figure(NamedTuple):
  """A value with its name, and a note below it."""

  name: str
  value: str
  note: str = ''


def figures(found: Sequence[Figure], small: bool = False) -> str:
  """Return values in a row, large unless `small`; nothing without any."""
  note = lambda one: f'<dd class="muted">{escape(one.note)}</dd>' if one.note else ''
  items = ''.join(
    f'<div><dt>{escape(one.name)}</dt><dd>{escape(one.value)}</dd>{note(one)}</div>\n'
    for one in found
  )
  return f'<dl class="figures{" small" if small else ""}">\n{items}</dl>\n' if items else ''


def section(name: str, heading: str, note: str, body: str) -> str:
  """Return a section with the id `name`, or nothing at all where the body is empty."""
  if not body:
    return ''
  about = f'<p class="muted">{escape(note)}</p>' if note else ''
  return f'<section id="{escape(name)}">\n<h2>{escape(heading)}</h2>\n{about}\n{body}\n</section>\n'


def pill(text: Any, look: str = '') -> str:
  """Return a word in a rounded frame; look: ' good', ' bad', or nothing."""
  return f'<span class="pill{look}">{escape(text)}</span>'


def chart_grid(charts: Sequence[tuple[str, str]], wide: bool = False) -> str:
  """Return cards of (title, `body`) side by side, wide ones in a row each; nothing without any."""
  if not charts:
    return ''
  cards = [
    f'<figure class="card"><figcaption>{escape(title)}</figcaption>{chart}</figure>'
    for title, chart in charts
  ]
  return f'<div class="charts{" wide" if wide else ""}">\n{"".join(cards)}\n</div>'


def number_table(
  columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], strong: int | None = None
) -> str:
  """Return a table of numbers, the name of each row first; the cells `strong` of rows stand out.

  What follows a line feed in a cell is shown small.
  """
  head = ''.join(f'<th scope="col">{escape(column)}</th>' if column else '<td></td>'
                 for column in columns)
  own = lambda place: ' class="own"' if place == strong else ''
  body = ''.join(
    f'<tr><th scope="row">{escape(name)}</th>'
    + ''.join(f'<td{own(place)}>{_cell(cell)}</td>' for place, cell in enumerate(cells))
    + '</tr>\n'
    for name, cells in rows
  )
  return _scrolling(f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>\n{body}'
                    '</tbody></table>', 'numbers')


def word_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
  """Return a table of words, the name of each row first."""
  head = ''.join(f'<th scope="col">{escape(column)}</th>' for column in columns)
  body = ''.join(
    f'<tr><th scope="row">{escape(name)}</th>'
    f'{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>\n' for name, cells in rows
  )
  return _scrolling(f'<table class="settings"><thead><tr>{head}</tr></thead><tbody>\n{body}'
                    '</tbody></table>', 'settings')


def _cell(text: str) -> str:
  value, _, small = text.partition('\n')
  return escape(value) + (f' <span class="range">{escape(small)}</span>' if small else '')


def _scrolling(table: str, name: str, look: str = 'card ') -> str:
  """Return a table in a frame that scrolls, also by the keyboard, where a screen is narrow."""
  return f'<div class="{look}scroll" tabindex="0" role="group" aria-label="{name}">{table}</div>'


def bullets(texts: Sequence[str]) -> str:
  """Return a list of sentences, or nothing without any."""
  items = ''.join(f'<li>{escape(text)}</li>\n' for text in texts)
  return f'<ul>\n{items}</ul>' if items else ''


def settings_table(values: dict[str, Any]) -> str:
  """Return a nested dict as a table: a group of rows for each dict in it, by its dotted path."""
  rows: list[str] = []
  _settings_rows(values, '', rows)
  table = f'<table class="settings"><tbody>\n{"".join(rows)}</tbody></table>'
  return _scrolling(table, 'settings', '')


def _settings_rows(values: dict[str, Any], path: str, rows: list[str]) -> None:
  for key, value in values.items():
    if not (isinstance(value, dict) and value):
      rows.append(f'<tr><th scope="row">{escape(key)}</th><td>{escape(plain(value))}</td></tr>\n')
  for key, value in values.items():
    if isinstance(value, dict) and value:
      rows.append(f'<tr class="group"><th colspan="2">{escape(path + key)}</th></tr>\n')
      _settings_rows(value, f'{path}{key}.', rows)


def details(summary: str, body: str, is_open: bool = False) -> str:
  """Return a block that opens and closes."""
  start = '<details open>' if is_open else '<details>'
  return f'{start}<summary>{escape(summary)}</summary>\n{body}\n</details>'


def number(value: Any) -> str:
  """Return four significant digits, thousands in groups; None is a dash."""
  if value is None:
    return '–'
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return plain(value)
  if not math.isfinite(value):
    return str(value)
  if isinstance(value, int) or abs(value) >= 1000:
    return f'{value:,.0f}' if abs(value) < 1e12 else f'{float(value):.4g}'
  return f'{value:.4g}'


def plain(value: Any) -> str:
  """Return a JSON value on one line, without the marks of a language."""
  if isinstance(value, (list, tuple)):
    return ', '.join(plain(item) for item in value) or '(empty)'
  if isinstance(value, dict):
    return ', '.join(f'{key}: {plain(item)}' for key, item in value.items()) or '(empty)'
  return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
  """Return words such as '42 s', '3 min 05 s', '7 h 12 min' or '2 d 3 h'."""
  if not math.isfinite(seconds):
    return str(seconds)
  s = round(seconds)
  if s < 60:
    return f'{s} s'
  if s < 3600:
    return f'{s // 60} min {s % 60:02d} s'
  if s < 86400:
    return f'{s // 3600} h {s % 3600 // 60:02d} min'
  return f'{s // 86400} d {s % 86400 // 3600} h'


class Frame(NamedTuple):
  """A picture of a step: its data URL, and what it shows, for screen readers."""

  step: int
  source: str
  label: str


def flip(sets: Sequence[tuple[str, Sequence[Frame]]]) -> str:
  """Return pictures to flip through by one slider: of each (`body` of its caption, frames) the
  last one up to the slider's step. The newest is shown where no program runs."""
  books = ''
  for caption, frames in sets:
    images = ''.join(
      f'<img data-step="{frame.step}" src="{frame.source}" alt="{escape(frame.label)}"'
      f'{" class=shown" if frame is frames[-1] else ""}>\n' for frame in frames
    )
    about = f'<figcaption>{caption}</figcaption>' if caption else ''
    books += f'<figure class="flip"><div class="frames">\n{images}</div>{about}</figure>\n'
  beside = f'<div class="pair">\n{books}</div>' if len(sets) > 1 else books
  return (
    f'<div class="flips">\n{beside}<div class="turn" hidden>'
    '<input type="range" min="0" value="0" aria-label="step of the pictures"><output></output>'
    '</div></div>\n'
  )


def picture(pixels: np.ndarray, label: str) -> str:
  """Return a small copy of an image, uint8 [h w 3], with a label for screen readers."""
  image = Image.fromarray(pixels)
  image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
  return f'<img src="{embed_image(image, 60_000)}" alt="{escape(label)}">'


def strip(
  shown: Sequence[tuple[Sequence[tuple[np.ndarray, str]], str]], large: bool = False
) -> str:
  """Return rows of ([(image, what it is) below each other], `body` of the caption); large: four to
  a row beside words."""
  items = ''.join(
    f'<figure>{"".join(picture(*image) for image in images)}'
    f'<figcaption>{caption}</figcaption></figure>\n' for images, caption in shown
  )
  return f'<div class="strip{" large" if large else ""}">\n{items}</div>' if items else ''


def embed_image(image: Image.Image, limit: int) -> str:
  """Return an image as a data URL of about `limit` characters at most, made smaller if needed."""
  while True:
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', optimize=True)
    size = len(buffer.getvalue()) * 4 / 3
    if size <= limit or max(image.size) <= 64:
      return png_source(buffer.getvalue())
    factor = max(0.3, min(0.85, math.sqrt(limit / size) * 0.97))
    smaller = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(smaller, Image.Resampling.LANCZOS)


def png_source(data: bytes) -> str:
  """Return the data URL of a PNG file."""
  return 'data:image/png;base64,' + base64.b64encode(data).decode()


def words(name: str) -> str:
  """Return a key as words: 'gradient_norm' is 'Gradient norm'."""
  text = ' '.join(name.replace('_', ' ').split())
  return text[:1].upper() + text[1:]
