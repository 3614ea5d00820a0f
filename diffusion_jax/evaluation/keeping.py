"""Pictures of an evaluation that stay: as PNGs or tar files for people, small ones for its page."""

import io
import tarfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.chunks import Chunks
from diffusion_jax.evaluation.extraction import THUMBNAILS, Made
from diffusion_jax.files import atomic_write

KINDS = ('png', 'tar')


class Keeper:
  """Keeps the images of a piece: NUMBER.png each, or one tar file of those.

  A piece is kept whole before its features are, so that a start after a kill finds all or makes
  all of it again. UserError for another kind.
  """

  def __init__(self, directory: Path, kind: str):
    if kind not in KINDS:
      raise UserError(f'Pictures cannot be kept as {kind!r}; choose {" or ".join(KINDS)}.')
    self._directory, self._kind = directory, kind

  def has(self, items: range) -> bool:
    """Whether the piece of these items has been kept."""
    if self._kind == 'tar':
      return self._archive(items).is_file()
    return any(self._file(number).is_file() for number in items)  # Damaged ones are not there.

  def __call__(self, items: range, made: Made) -> None:
    """Keeps a piece."""
    images = [pair for pair in zip(items, made.images, strict=True) if pair[1] is not None]
    if self._kind == 'png':
      for number, image in images:
        with atomic_write(self._file(number)) as file:
          file.write(_png(image))
      return
    with (
      atomic_write(self._archive(items)) as file,
      tarfile.open(fileobj=file, mode='w') as archive,
    ):
      for number, image in images:
        data = _png(image)
        entry = tarfile.TarInfo(self._file(number).name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))

  def _file(self, number: int) -> Path:
    return self._directory / f'{number:06d}.png'

  def _archive(self, items: range) -> Path:
    return self._directory / f'{items.start:06d}-{items.stop - 1:06d}.tar'


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
