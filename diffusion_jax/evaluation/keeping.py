"""Pictures of an evaluation that stay: as PNGs or tar files for people, small ones for its page."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.chunks import Chunks
from diffusion_jax.evaluation.extraction import THUMBNAILS, Made
from diffusion_jax.io.whole import replacing

KINDS = ('png', 'tar')


def keeper(directory: Path, kind: str) -> Callable[[range, Made], None]:
  """A function that keeps the images of a piece: NUMBER.png each, or one tar file of those.

  A piece is kept whole before its features are, so that a start after a kill finds all or makes
  all of it again. UserError for another kind.
  """
  if kind not in KINDS:
    raise UserError(f'Pictures cannot be kept as {kind!r}; choose {" or ".join(KINDS)}.')
  return lambda items, made: (_keep_png if kind == 'png' else _keep_tar)(directory, items, made)


def _keep_png(directory: Path, items: range, made: Made) -> None:
  for number, image in zip(items, made.images, strict=True):
    if image is not None:
      with replacing(directory / f'{number:06d}.png') as file:
        file.write(_png(image))


def _keep_tar(directory: Path, items: range, made: Made) -> None:
  path = directory / f'{items.start:06d}-{items.stop - 1:06d}.tar'
  with replacing(path) as file, tarfile.open(fileobj=file, mode='w') as archive:
    for number, image in zip(items, made.images, strict=True):
      if image is not None:
        data = _png(image)
        entry = tarfile.TarInfo(f'{number:06d}.png')
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


def _png(image: UInt8[np.ndarray, 'h w 3']) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format='PNG')
  return buffer.getvalue()


class Thumbnails:
  """The small pictures of a work's images by number; None for one without."""

  def __init__(self, chunks: Chunks):
    self._chunks = chunks

  def __getitem__(self, number: int) -> UInt8[np.ndarray, 't t 3'] | None:
    arrays = self._chunks.load(number // self._chunks.size)
    if THUMBNAILS not in arrays:
      return None
    return arrays[THUMBNAILS][number % self._chunks.size]
