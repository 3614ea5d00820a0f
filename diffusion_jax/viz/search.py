"""The page of a search: for each query the pictures that are nearest, best first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from diffusion_jax.files import atomic_write
from diffusion_jax.viz import page


class Hit(NamedTuple):
  """A picture that was found, how alike it is (a cosine), and its pixels."""

  name: str
  similarity: float
  pixels: UInt8[ndarray, 'h w 3']


class Result(NamedTuple):
  """A query in words, its picture if it is one, and what was found for it."""

  query: str
  hits: Sequence[Hit]
  picture: UInt8[ndarray, 'h w 3'] | None = None


def write_search_page(path: Path, results: Sequence[Result], about: Sequence[str]) -> None:
  """Write a self-contained page; about: sentences on what was searched."""
  found = f'<header><h1>Search</h1></header>{page.bullets(about)}'
  body = page.first_screen(found, '')
  for number, result in enumerate(results):
    shown = [
      ([(hit.pixels, hit.name)], f'{hit.similarity:.3f}<br>{page.escape(hit.name)}')
      for hit in result.hits
    ]
    own = '' if result.picture is None else (
      f'<div class="asked">{page.picture(result.picture, result.query)}</div>'
    )
    body += page.section(f'query-{number}', result.query, '', own + page.strip(shown))
  with atomic_write(path) as file:
    file.write(page.page('Search', body).encode())
