"""Grids of captioned images, and PNG files that carry their own metadata."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write

_BACKGROUND = (255, 255, 255)
_INK = (51, 51, 51)
_ELLIPSIS = '…'
_CAPTION_LINES = 3
MOST = 256
"""Most images of an `Overview`."""
_CELL = 192
"""Pixels that small images are enlarged to in an `Overview`."""
_PIXELS = 2**25
"""Most pixels of an `Overview`, which any program can open."""


def make_grid(
  images: UInt8[np.ndarray, 'n h w 3'],
  columns: int,
  captions: Sequence[str] | None = None,
  scale: int = 1,
  padding: int = 4,
  lines: int = _CAPTION_LINES,
) -> Image.Image:
  """Lay images out row by row on white, each with its caption below.

  Image i's top left pixel is at x = padding + column * (w * scale + padding), y = padding + row *
  (h * scale + caption height + padding). Pixels are repeated `scale` times. Captions wrap to at
  most `lines` lines, then an ellipsis; all have the longest's height. UserError: images are not a
  non-empty uint8 [n h w 3], the number of captions is not n, or columns or scale is below 1.
  """
  images = np.asarray(images)
  _check_grid(images, columns, captions, scale)
  n, h, w, _ = images.shape
  columns = min(columns, n)
  font = _font(captions or [], w * scale)
  wrapped = [_wrap(caption, font, w * scale, lines) for caption in captions or []]
  line_height = sum(font.getmetrics()) + 1
  caption_height = max(map(len, wrapped), default=0) * line_height + (3 if wrapped else 0)
  cell_w, cell_h = w * scale + padding, h * scale + caption_height + padding
  rows = -(-n // columns)
  grid = Image.new('RGB', (padding + columns * cell_w, padding + rows * cell_h), _BACKGROUND)
  draw = ImageDraw.Draw(grid)
  for i, image in enumerate(images):
    x, y = padding + i % columns * cell_w, padding + i // columns * cell_h
    grid.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (x, y))
    for number, line in enumerate(wrapped[i] if wrapped else []):
      draw.text((x, y + h * scale + 2 + number * line_height), line, _INK, font)
  return grid


def framed(
  images: UInt8[np.ndarray, 'n h w 3'] | Sequence[UInt8[np.ndarray, 'h w 3']]
) -> UInt8[np.ndarray, 'n h w 3']:
  """Images of several sizes as ones of the greatest height and width, each in the middle of white.
  """
  height, width = np.max([image.shape[:2] for image in images], axis=0)
  found = np.full((len(images), height, width, 3), _BACKGROUND, np.uint8)
  for frame, image in zip(found, images, strict=True):
    h, w = image.shape[:2]
    top, left = (height - h) // 2, (width - w) // 2
    frame[top : top + h, left : left + w] = image
  return found


class Overview:
  """The first MOST of any number of images as one square grid, in bounded memory.

  Small images are enlarged by repeated pixels, large ones shrunk so that all fit 2**25 pixels.
  """

  def __init__(self, total: int):
    self._count = min(total, MOST)
    self._images: list[np.ndarray] = []

  def add(self, image: UInt8[np.ndarray, 'h w 3']) -> None:
    """Add the next image."""
    if len(self._images) == self._count:
      return
    factor = math.ceil(math.sqrt(image.shape[0] * image.shape[1] * self._count / _PIXELS))
    small = Image.fromarray(image).reduce(factor) if factor > 1 else image
    self._images.append(np.asarray(small))

  def grid(self, captions: Sequence[str]) -> Image.Image:
    """Return the images so far, with their captions."""
    images = np.stack(self._images)
    return make_grid(
      images, columns=math.ceil(math.sqrt(len(images))), captions=captions,
      scale=max(1, _CELL // images.shape[1]),
    )


def _check_grid(
  images: np.ndarray, columns: int, captions: Sequence[str] | None, scale: int
) -> None:
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
    raise UserError(
      f'A grid is made of uint8 images [n h w 3], not {images.dtype} {list(images.shape)}: '
      'convert them with pixels.to_uint8.'
    )
  if columns < 1 or scale < 1:
    raise UserError(f'A grid needs columns and scale of 1 or more, not {columns} and {scale}.')
  if captions is not None and len(captions) != len(images):
    raise UserError(
      f'{len(images)} images came with {len(captions)} captions: give one caption for each image.'
    )


def _font(captions: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
  """A font for cells of `width` pixels; beyond ASCII, Pillow's own lacks even accents."""
  size = min(max(width // 10, 10), 18)
  if all(caption.isascii() for caption in captions):
    return ImageFont.load_default(size)
  return ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf', size)


def _wrap(
  text: str, font: ImageFont.FreeTypeFont, width: int, most: int = _CAPTION_LINES
) -> list[str]:
  """At most `most` lines of at most `width` pixels, broken at spaces and hyphens."""
  lines = ['']
  for part in re.findall(r' ?[^ -]+-*| ?-+', ' '.join(_encodable(text[:1000]).split())):
    if font.getlength(lines[-1] + part) <= width:
      lines[-1] += part
      continue
    if lines[-1]:
      lines.append('')
    for letter in part.lstrip():
      if lines[-1] and font.getlength(lines[-1] + letter) > width:
        lines.append('')
      lines[-1] += letter
    if len(lines) > most:
      break
  if len(lines) <= most:
    return lines
  last = lines[most - 1]
  while last and font.getlength(last + _ELLIPSIS) > width:
    last = last[:-1]
  return [*lines[: most - 1], last.rstrip() + _ELLIPSIS]


def save_png(image: Image.Image, path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
  """Write a PNG atomically, with `metadata` in tEXt chunks, iTXt beyond Latin-1, as in PIL.

  UserError for a key that is not 1 to 79 Latin-1 characters.
  """
  path = Path(path)
  chunks = PngImagePlugin.PngInfo()
  for key, value in metadata.items():
    if not 1 <= len(key) <= 79 or not key.isprintable() or max(map(ord, key)) > 255:
      raise UserError(
        f'{key!r} cannot name PNG metadata: use 1 to 79 printable Latin-1 characters.'
      )
    chunks.add_text(key, _encodable(value))
  with atomic_write(path) as file:
    image.save(file, format='PNG', pnginfo=chunks)


def _encodable(text: str) -> str:
  """Lone surrogates, as they come from undecodable file names, turn into question marks."""
  return text.encode('utf-8', 'replace').decode('utf-8')
