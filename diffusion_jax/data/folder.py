"""A folder of pictures with captions, as people keep them for fine-tuning.

A picture's captions are the lines of the text file beside it (cat.png, cat.txt), or its entry in
metadata.jsonl ({"file_name": "cat.png", "text": "a cat"}), or those given for all, one a line. With
folders train/ and test/ inside, each is a split; otherwise the pictures are split by their content.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from diffusion_jax.data.images import image_size, read_image
from diffusion_jax.data.splits import APART, TEST_FRACTION, Measured, by_content
from diffusion_jax.errors import UserError

FOLDER = 'folder:'
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


def open_folder(
  dataset: str, size: int, caption: str = '', test_fraction: float = TEST_FRACTION
) -> tuple['FolderSource', 'FolderSource']:
  """(train, test) of 'folder:PATH', pictures of size x size pixels.

  Args:
    caption: of those that have none of their own.
    test_fraction: share of the pictures that is for the test, where no folders say which.

  Raises:
    UserError: no such folder, no picture in it, a picture without caption, or a bad metadata.jsonl.
  """
  folder = Path(dataset.removeprefix(FOLDER))
  if not folder.is_dir():
    raise UserError(f'there is no folder {folder}; give data.dataset=folder:PATH of pictures.')
  split = [folder / name for name in ('train', 'test')]
  if all(place.is_dir() for place in split):
    return tuple(FolderSource(place, size, caption) for place in split)
  every = FolderSource(folder, size, caption)
  parts = by_content(every.files, test_fraction)
  return every.part(parts.train, parts.measured), every.part(parts.test, parts.measured)


def pictures(folder: Path) -> list[Path]:
  """The files of a folder that are pictures by their names, in order."""
  files = (path for path in folder.iterdir() if not path.name.startswith('.'))
  return sorted(path for path in files if path.suffix.lower() in SUFFIXES)


class FolderSource:
  """Records of the pictures in a folder; image uint8 [size size 3], its central square.

  A record also has 'sizes', float32 [6]: height and width of the upright picture, top and left of
  the square in it once its shorter edge is `size`, and the size twice, as SDXL is told them.
  """

  def __init__(self, folder: Path, size: int, caption: str = ''):
    self.folder, self.size, self.measured = folder, size, APART
    self.files = pictures(folder)
    if not self.files:
      raise UserError(f'the folder {folder} has no picture ({", ".join(SUFFIXES)}); add some.')
    known = _metadata(folder / 'metadata.jsonl')
    self.captions = [_captions(file, known, caption) for file in self.files]

  def part(self, numbers: Sequence[int], measured: Measured) -> 'FolderSource':
    """A source of these records alone."""
    part = copy.copy(self)
    part.files = [self.files[i] for i in numbers]
    part.captions = [self.captions[i] for i in numbers]
    part.measured = measured
    return part

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: SupportsIndex) -> dict:
    """Record `index`. UserError where the picture cannot be read."""
    index = range(len(self.files))[index]
    file = self.files[index]
    image = read_image(file, self.size)
    height, width = image_size(file)
    scale = self.size / min(height, width)
    offset = lambda edge: (round(edge * scale) - self.size) // 2
    sizes = (height, width, offset(height), offset(width), self.size, self.size)
    return {
      'image': image, 'captions': self.captions[index], 'id': file.stem,
      'sizes': np.asarray(sizes, np.float32),
    }


class Together:
  """Two sources in turn, the shorter one over and over: the subject, and its class beside it.

  'weight' is 2 for the first and twice `weight` for the second, so that the mean over an even
  mixture is the sum of both means.
  """

  def __init__(self, subject: Sequence, other: Sequence, weight: float):
    self.sources, self.weights = (subject, other), (2.0, 2.0 * weight)

  def __len__(self) -> int:
    return 2 * max(map(len, self.sources))

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    which, place = index % 2, index // 2
    source = self.sources[which]
    return source[place % len(source)] | {'weight': np.float32(self.weights[which])}


def _metadata(path: Path) -> dict[str, str]:
  if not path.is_file():
    return {}
  try:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row['file_name']: str(row['text']) for row in rows}
  except (ValueError, KeyError, TypeError, OSError) as error:
    raise UserError(
      f'{path} cannot be read ({error}); give one object a line with file_name and text.'
    ) from error


def _captions(file: Path, known: dict[str, str], caption: str) -> list[str]:
  beside = file.with_suffix('.txt')
  try:
    text = beside.read_text() if beside.is_file() else known.get(file.name, caption)
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'the captions {beside} cannot be read ({error}); save UTF-8.') from error
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    raise UserError(
      f'{file} has no caption; write {beside.name} beside it, name it in metadata.jsonl, or set '
      'data.caption.'
    )
  return lines
