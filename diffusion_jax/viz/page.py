"""The frame of a self-contained HTML page: style, sections, tables and embedded images.

All functions escape their texts; only arguments named `body` are HTML.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ground: #faf9f7; --card: #fff; --ink: #24272d;
  --muted: #656b76; --line: #e5e2dc; --accent: #0a6aa6; --good: #0b7a55; --bad: #b3401a; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --card: #1d2025; --ink: #e4e5e8;
  --muted: #9aa0ab; --line: #30343b; --accent: #6db8e8; --good: #4cc79b; --bad: #f0855a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
header { margin-bottom: 2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .45rem; letter-spacing: -0.01em; }
section { margin-top: 2.75rem; }
a { color: var(--accent); }
.muted, figcaption { color: var(--muted); font-size: .875rem; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 1rem;
  padding: .05rem .7rem; font-size: .85rem; margin-right: .6rem; color: var(--accent); }
.pill.good { color: var(--good); } .pill.bad { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem;
  margin: 0; }
.figures div, .card { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; padding: .8rem 1rem; min-width: 0; margin: 0; }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.charts.wide { grid-template-columns: 1fr; }
.charts + .charts { margin-top: 1rem; }
.card figcaption { color: var(--ink); font-weight: 600; margin-bottom: .3rem;
  overflow-wrap: anywhere; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers .own { font-weight: 600; }
.settings th { width: 40%; overflow-wrap: anywhere; }
.settings td { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
.settings .group th { color: var(--accent); padding-top: 1.1rem; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .7rem 1rem; margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; }
details li, details dd { overflow-wrap: anywhere; white-space: pre-wrap; }
.latest { display: inline-block; max-width: 100%; background: #fff; }
.latest img { display: block; max-width: 100%; height: auto; }
.strip { display: flex; gap: .8rem; overflow-x: auto; padding: .9rem 0 .5rem; }
.strip figure { margin: 0; flex: none; text-align: center; }
.strip figcaption { max-width: 13rem; margin: auto; overflow-wrap: anywhere; }
.strip img { display: block; max-height: 13rem; max-width: 13rem; border-radius: .3rem;
  border: 1px solid var(--line); background: #fff; }
footer { margin-top: 3rem; }
@media (max-width: 36rem) { body { padding: 1.4rem .8rem 3rem; } h1 { font-size: 1.5rem; }
  .card { padding: .6rem .7rem; } .figures { grid-template-columns: 1fr 1fr; } }
"""

# The browser itself refuses whatever would come from outside.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


THUMBNAIL = 128
"""The longest edge of pictures in a strip."""


def escape(value: Any) -> str:
  """Return text that is safe in an element and in a quoted attribute."""
  return html.escape(str(value), quote=True)


def page(title: str, body: str) -> str:
  """A whole HTML document that loads nothing."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n'
    '</body>\n</html>\n'
  )


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
  """Return cards of (title, SVG) side by side, wide ones in a row each; nothing without charts."""
  if not charts:
    return ''
  cards = [
    f'<figure class="card"><figcaption>{escape(title)}</figcaption>{_inline(svg)}</figure>'
    for title, svg in charts
  ]
  return f'<div class="charts{" wide" if wide else ""}">\n{"".join(cards)}\n</div>'


def _inline(svg: str) -> str:
  """Inside HTML an <svg> needs no namespaces; without them no address is left in the page."""
  return re.sub(r' xmlns(:xlink)?="[^"]*"', '', svg, count=2)


def number_table(
  columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], strong: int | None = None
) -> str:
  """Return a table of numbers, the name of each row first; the cells `strong` of rows stand out."""
  head = ''.join(f'<th scope="col">{escape(column)}</th>' for column in columns)
  own = lambda place: ' class="own"' if place == strong else ''
  body = ''.join(
    f'<tr><th scope="row">{escape(name)}</th>'
    + ''.join(f'<td{own(place)}>{escape(cell)}</td>' for place, cell in enumerate(cells))
    + '</tr>\n'
    for name, cells in rows
  )
  return (
    f'<div class="card scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
    f'<tbody>\n{body}</tbody></table></div>'
  )


def bullets(texts: Sequence[str]) -> str:
  """Return a list of sentences, or nothing without any."""
  items = ''.join(f'<li>{escape(text)}</li>\n' for text in texts)
  return f'<ul>\n{items}</ul>' if items else ''


def settings_table(values: dict[str, Any]) -> str:
  """Return a nested dict as a table: a group of rows for each dict in it, by its dotted path."""
  rows: list[str] = []
  _settings_rows(values, '', rows)
  table = f'<table class="settings"><tbody>\n{"".join(rows)}</tbody></table>'
  return f'<div class="scroll">{table}</div>'


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


def picture(pixels: np.ndarray, label: str) -> str:
  """Return a small copy of an image, uint8 [h w 3], with a label for screen readers."""
  image = Image.fromarray(pixels)
  image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
  return f'<img src="{embed_image(image, 60_000)}" alt="{escape(label)}">'


def strip(shown: Sequence[tuple[Sequence[tuple[np.ndarray, str]], str]]) -> str:
  """Return a strip of ([(image, what it is) below each other], `body` of the caption)."""
  figures = ''.join(
    f'<figure>{"".join(picture(*image) for image in images)}'
    f'<figcaption>{caption}</figcaption></figure>\n' for images, caption in shown
  )
  return f'<div class="strip">\n{figures}</div>' if figures else ''


def embed_image(image: Image.Image, limit: int) -> str:
  """Return an image as a data URL of about `limit` characters at most, made smaller if needed."""
  while True:
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', optimize=True)
    size = len(buffer.getvalue()) * 4 / 3
    if size <= limit or max(image.size) <= 64:
      return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()
    factor = max(0.3, min(0.85, math.sqrt(limit / size) * 0.97))
    smaller = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(smaller, Image.Resampling.LANCZOS)
