"""Sets of images that are evaluated: folders, prepared data sets, reference batches.

Images keep their own size: each kind of features has its own rule to resize by.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from diffusion_jax.data.folder import SUFFIXES
from diffusion_jax.data.images import read_pixels
from diffusion_jax.errors import UserError


class Picture(NamedTuple):
  """pixels: uint8 [h w 3]. caption: '' where there is none."""

  pixels: np.ndarray
  caption: str = ''


class ImageSet(Protocol):
  """Images by number. `name` says which they are; two sets of one name are the same."""

  name: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Picture:
    """Image `index`. UserError where it cannot be read."""
    ...


class Folder:
  """All pictures of a folder and of the folders in it, in the order of their paths.

  UserError where there is no folder or no picture in it.
  """

  def __init__(self, folder: str | Path):
    root = Path(folder)
    if not root.is_dir():
      raise UserError(f'there is no folder {root}; give one of pictures.')
    self.name = f'folder:{root.resolve()}'
    self.files = sorted(
      path for path in root.rglob('*')
      if path.suffix.lower() in SUFFIXES and not path.name.startswith('.')
    )
    if not self.files:
      raise UserError(f'the folder {root} has no picture ({", ".join(SUFFIXES)}).')

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Picture:
    return Picture(read_pixels(self.files[index]))


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of a data set, as `data.sources.open_source` opens it; its first captions."""

  records: Sequence
  name: str

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Picture:
    record = self.records[index]
    return Picture(record['image'], record['captions'][0])


@dataclasses.dataclass(frozen=True)
class First:
  """The first images of a set, in an order that is fixed for each length: a fair sample."""

  images: ImageSet
  count: int

  def __post_init__(self):
    if not 1 <= self.count <= len(self.images):
      raise UserError(
        f'{self.count} images cannot be taken of {self.images.name}; it has {len(self.images)}.'
      )

  @property
  def name(self) -> str:
    return f'{self.count} of {self.images.name}'

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Picture:
    order = np.random.default_rng(0).permutation(len(self.images))
    return self.images[int(order[index])]
