"""The page of plans: memory and time of each target as bars, and all that was said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.files import atomic_write
from diffusion_jax.viz import page

HEIGHT = 18


class Row(NamedTuple):
  """A target. memory: GB by what they are for, of `limit` GB, 0 where that is unknown. times:
  milliseconds of a step by what takes them. lines: on it, the first its head."""

  target: str
  memory: Mapping[str, float]
  limit: float
  times: Mapping[str, float]
  lines: Sequence[str]


def bar(parts: Mapping[str, float], whole: float, unit: str) -> str:
  """Return parts of a whole beside each other, as long as they are large; a legend says each.

  Where they are more together than the whole, they fill the bar.
  """
  total = sum(parts.values())
  scale, start, pieces, words = 1000 / (max(whole, total) or 1), 0.0, [], []
  for place, (name, value) in enumerate(parts.items()):
    text = f'{name} {value:,.3g} {unit}'
    pieces.append(
      f'<rect class="s{place % 6}" x="{start:.1f}" y="0" width="{value * scale:.1f}" '
      f'height="{HEIGHT}"><title>{page.escape(text)}</title></rect>'
    )
    words.append(f'<span class="s{place % 6}">{page.escape(text)}</span>')
    start += value * scale
  rest = f'{total:,.3g} of {whole:,.4g} {unit}' if whole else f'{total:,.3g} {unit}'
  return (
    f'<svg class="bar" viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none" role="img" '
    f'aria-label="{page.escape(rest)}"><rect class="rest" x="0" y="0" width="1000" '
    f'height="{HEIGHT}"/>{"".join(pieces)}</svg>\n<p class="parts">{" · ".join(words)}: '
    f'{page.escape(rest)}</p>'
  )


def write_plan_page(path: Path, rows: Sequence[Row], table: Sequence[str], note: str) -> None:
  """Write a self-contained page; table: the targets side by side, a line each, its head first."""
  side = '<pre class="card scroll">' + '\n'.join(map(page.escape, table)) + '</pre>'
  body = page.first_screen(f'<header><h1>Plan</h1></header><p>{page.escape(note)}</p>{side}', '')
  longest = max((sum(row.times.values()) for row in rows), default=0.0)
  for number, row in enumerate(rows):
    own = ''
    if row.memory:
      own += '<h3>Memory of a device</h3>' + bar(row.memory, row.limit, 'GB')
    if row.times:
      own += '<h3>Time of a step, beside the longest</h3>' + bar(row.times, longest, 'ms')
    lines = '\n'.join(page.escape(line.strip()) for line in row.lines[1:])
    own += f'<pre class="card scroll">{lines}</pre>' if lines else ''
    body += page.section(f'target-{number}', row.target, row.lines[0], own)
  with atomic_write(path) as file:
    file.write(page.page('Plan', body).encode())
