"""A folder of pictures with captions, as people keep them for fine-tuning.

A picture's captions are the lines of the text file beside it (cat.png, cat.txt), or its row in
metadata.jsonl ({"file_name": "cat.png", "text": "a cat"}) or metadata.csv, or those given for all,
one a line. Pictures may lie in folders within. With folders train/ and test/ inside, each is a
split; otherwise the pictures are split by their content.

Pictures in folders by class: PATH/cat/1.png, PATH/dog/1.png.

A class has the pictures of its folder and of the folders in it. With folders train/ and test/
inside, each is a split that holds one folder for each class. Otherwise the pictures are split by
their content.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.captions import captions_of, check_characters
from diffusion_jax.data.finding import (
  SUFFIXES,
  Left,
  find_files,
  key_of,
  own_splits,
  with_suffixes,
)
from diffusion_jax.data.images import image_size, read_image
from diffusion_jax.data.splits import (
  APART,
  Measured,
  by_content,
  of_files,
  of_own_folders,
  of_texts,
)
from diffusion_jax.errors import UserError

FOLDER = 'folder:'


def captioned(config: DataConfig) -> tuple['FolderSource', 'FolderSource']:
  """Return (train, test) of the folder that a `DataConfig` names."""
  return open_folder(
    config.dataset, config.size, config.caption, config.test_fraction, config.caption_column
  )


def open_folder(
  dataset: str, size: int, caption: str = '', test_fraction: float = DataConfig.test_fraction,
  caption_column: str = '',
) -> tuple['FolderSource', 'FolderSource']:
  """(train, test) of 'folder:PATH', pictures of size x size pixels.

  Args:
    caption: of those that have none of their own.
    test_fraction: share of the pictures that is for the test, where no folders say which.
    caption_column: of metadata.jsonl or metadata.csv; '' for all of `metadata.CAPTIONS`.

  Raises:
    UserError: no such folder, no picture in it, a picture without caption, or a list of captions
      that cannot be read.
  """
  root, left = Path(dataset.removeprefix(FOLDER)), Left()
  files = files_of(root, left)
  pictures = with_suffixes(files)
  first, second = own_splits(pictures, root)
  chosen = within(pictures, first, second, left)
  captions = captions_of(files, [*chosen[0], *chosen[1]], root, caption, caption_column, left)
  notes = left.notes(root)
  train = FolderSource(first, chosen[0], captions[: len(chosen[0])], size, notes)
  if second:
    test = FolderSource(second, chosen[1], captions[len(chosen[0]) :], size)
    test.measured = of_own_folders(*chosen)
    return train, test
  parts = by_content(train.files, test_fraction)
  return train.part(parts.train, parts.measured), train.part(parts.test, parts.measured)


def open_all(root: Path, size: int, caption: str) -> 'FolderSource':
  """All pictures of a folder. UserError as `open_folder`."""
  left = Left()
  files = files_of(root, left)
  pictures = with_suffixes(files)
  captions = captions_of(files, pictures, root, caption, '', left)
  return FolderSource(root, pictures, captions, size, left.notes(root))


def files_of(root: Path, left: Left) -> list[Path]:
  """All files of a folder of pictures. UserError where it has no picture, or is none."""
  if not root.is_dir():
    raise UserError(f'there is no folder {root}; give data.dataset=folder:PATH of pictures.')
  files = find_files(root, left)
  if not with_suffixes(files):
    told = f', but {"; ".join(left.told())}' if left.told() else ''
    raise UserError(f'the folder {root} has no picture ({", ".join(SUFFIXES)}){told}; add some.')
  return files


def within(
  pictures: Sequence[Path], first: Path, second: Path | None, left: Left
) -> tuple[list[Path], ...]:
  """The pictures below each of two folders; `left` is told of others."""
  chosen = [[path for path in pictures if place and path.is_relative_to(place)]
            for place in (first, second)]
  if second:
    outside = set(pictures).difference(*chosen)
    for path in sorted(outside):
      left.add(
        f'pictures outside of {first.name} and {second.name}', path.relative_to(first.parent)
      )
  return tuple(chosen)


def id_of(path: Path, folder: Path) -> str:
  """A picture's path below a folder, without its suffix."""
  return key_of(path.relative_to(folder).with_suffix('').as_posix())


class FolderSource:
  """Records of pictures in a folder; image uint8 [size size 3], its central square.

  A record also has 'sizes', float32 [6]: height and width of the upright picture, top and left of
  the square in it once its shorter edge is `size`, and the size twice, as SDXL is told them.

  notes: what of the folder is not used, for people. measured: what scores on it are measured on.
  """

  def __init__(
    self, folder: Path, files: Sequence[Path], captions: Sequence[list[str]], size: int,
    notes: tuple[str, ...] = (),
  ):
    self.folder, self.files, self.captions = folder, list(files), list(captions)
    self.size, self.notes, self.measured = size, notes, APART

  def part(self, numbers: Sequence[int], measured: Measured) -> 'FolderSource':
    """A source of these records alone."""
    part = copy.copy(self)
    part.files = [self.files[i] for i in numbers]
    part.captions = [self.captions[i] for i in numbers]
    part.measured = measured
    return part

  def fingerprint(self) -> dict[str, str]:
    """Changes with the pictures, or with their captions."""
    return {
      'pictures': of_files(self.files, self.folder), 'captions': of_texts(self.captions),
    }

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
      'image': image, 'captions': self.captions[index], 'id': id_of(file, self.folder),
      'sizes': np.asarray(sizes, np.float32),
    }


class Together:
  """Two sources in turn, the shorter one over and over: the subject, and its class beside it.

  'weight' is 2 for the first and twice `weight` for the second, so that the mean over an even
  mixture is the sum of both means.
  """

  turns = 2

  def __init__(self, subject: Sequence, other: Sequence, weight: float):
    self.sources, self.weights = (subject, other), (2.0, 2.0 * weight)
    self.credit = getattr(subject, 'credit', '')

  def __len__(self) -> int:
    return 2 * max(map(len, self.sources))

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    which, place = index % 2, index // 2
    source = self.sources[which]
    return source[place % len(source)] | {'weight': np.float32(self.weights[which])}


def open_labelled(
  dataset: str, size: int, test_fraction: float = DataConfig.test_fraction
) -> tuple['LabelledFolder', 'LabelledFolder']:
  """(train, test) of 'folder:PATH', pictures of size x size pixels.

  Args:
    test_fraction: share of the pictures that is for the test, where no folders say which.

  Raises:
    UserError: no such folder, or a split without pictures in folders of classes.
  """
  root, left = Path(dataset.removeprefix(FOLDER)), Left()
  files = files_of(root, left)
  for path in files:
    if path.suffix.lower() not in SUFFIXES:
      left.add(f'files of another kind ({path.suffix or "no suffix"})', path.relative_to(root))
  pictures = with_suffixes(files)
  places = own_splits(pictures, root)
  chosen = [
    _in_classes(part, place, left)
    for part, place in zip(within(pictures, *places, left), places, strict=True) if place
  ]
  notes = left.notes(root)
  train = LabelledFolder(places[0], chosen[0], size, notes=notes)
  if len(chosen) == 2:
    return train, LabelledFolder(places[1], chosen[1], size, of_own_folders(*chosen))
  parts = by_content(train.files, test_fraction, train.labels)
  return tuple(
    LabelledFolder(places[0], [train.files[i] for i in part], size, parts.measured, notes)
    for part in (parts.train, parts.test)
  )


def _in_classes(pictures: Sequence[Path], folder: Path, left: Left) -> list[Path]:
  """Those that are in a folder of `folder`."""
  found = []
  for path in pictures:
    if len(path.relative_to(folder).parts) > 1:
      check_characters(path.relative_to(folder).parts[0], f'a folder of a class in {folder}')
      found.append(path)
    else:
      left.add('pictures outside of the folders of classes', path.name)
  if not found:
    raise UserError(
      f'the folder {folder} has no folders of pictures ({", ".join(SUFFIXES)}); make one for each '
      'class, by its name.'
    )
  return found


class LabelledFolder:
  """Records of pictures whose label is their folder's name; image uint8 [size size 3], the central
  square.

  notes: what of the folder is not used, for people. measured: what scores on it are measured on.
  """

  def __init__(
    self, folder: Path, files: Sequence[Path], size: int, measured: Measured = APART,
    notes: tuple[str, ...] = (),
  ):
    self.folder, self.files, self.size = folder, list(files), size
    self.measured, self.notes = measured, notes

  def __len__(self) -> int:
    return len(self.files)

  @property
  def labels(self) -> list[str]:
    """Of every record, without reading a picture."""
    return [self._label(file) for file in self.files]

  def _label(self, file: Path) -> str:
    return key_of(file.relative_to(self.folder).parts[0])

  def fingerprint(self) -> dict[str, str]:
    """Changes with the pictures, or with their classes."""
    return {'pictures': of_files(self.files, self.folder)}

  def __getitem__(self, index: SupportsIndex) -> dict:
    """Record `index`. UserError where the picture cannot be read."""
    file = self.files[range(len(self.files))[index]]
    label = self._label(file)
    return {
      'image': read_image(file, self.size), 'captions': [label], 'id': id_of(file, self.folder),
      'label': label,
    }
