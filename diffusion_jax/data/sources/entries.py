"""Pictures by number, undecoded, with the texts that belong to them: what a kind of source reads.

A new kind is a class of `Entries`, and a row in `registry.SOURCES` that makes `PictureSource`s of
it; decoding, cutting, splits and bad records are the same for all.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.data.splits import (
  FILES,
  RECORDS,
  content_hash,
  name_hash,
  of_names,
  of_texts,
  spread,
)


class Entry(NamedTuple):
  """A picture that is not decoded yet.

  name: the record's id. where: what errors call the picture. picture: its path, or its bytes.
  captions: texts, None where there is a label alone. weights: as many, for how often each is
  chosen; () for equally often. label: its class, None without.
  """

  name: str
  where: str
  picture: Path | bytes
  captions: Sequence[str] | None = None
  weights: Sequence[float] = ()
  label: str | None = None

  @property
  def source(self) -> Path | BinaryIO:
    """What `data.images` decodes."""
    return io.BytesIO(self.picture) if isinstance(self.picture, bytes) else self.picture


class Entries(Sequence[Entry]):
  """Entries by number; `len()` and `entries[i]`, which raises Unreadable, are a kind's own.

  sizes: (height, width) of the upright pictures, int32 [n 2], where they are known without reading
  any; 0 of what cannot be read. labels: one for each, or None.
  """

  sizes: np.ndarray | None = None
  labels: Sequence[str] | None = None

  def read(self, index: int) -> bytes:
    """The bytes of a picture, as they were stored. Unreadable."""
    picture = self[index].picture
    return picture if isinstance(picture, bytes) else picture.read_bytes()

  def name(self, index: int) -> str:
    """The id of a record."""
    return self[index].name

  def hash(self, index: int) -> bytes:
    """The digest of a picture's bytes, `splits.content_hash`; of its number if it is unreadable."""
    try:
      return content_hash(io.BytesIO(self.read(index)))
    except Exception:  # An error names it when the picture is read.
      return name_hash(b'%d' % index)

  def fingerprint(self, numbers: Sequence[int]) -> dict[str, str]:
    """Hashes that change with the names, pictures and texts of these records, in order."""
    some = [numbers[i] for i in spread(len(numbers), FILES)]
    return {
      'pictures': of_names(map(self.name, numbers), map(self.hash, some)),
      'captions': of_texts([self._texts(numbers[i]) for i in spread(len(numbers), RECORDS)]),
    }

  def _texts(self, index: int) -> list:
    """The captions, weights and label; none of a record that cannot be read."""
    try:
      entry = self[index]
    except Exception:
      return []
    return [list(entry.captions or ()), *([list(entry.weights)] * bool(entry.weights)), entry.label]
