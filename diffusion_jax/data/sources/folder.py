"""Folders of pictures, with captions or by class.

Captions are the lines of the text file beside a picture (cat.png, cat.txt), or its row in
metadata.jsonl ({"file_name": "cat.png", "text": "a cat"}) or metadata.csv, or those given for all.
The class is the folder below the root (PATH/cat/1.png). Folders may be nested. Folders train/ and
test/ are the splits; without them pictures are split by content.
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
from diffusion_jax.data.images import read_square
from diffusion_jax.data.splits import (
  APART,
  Measured,
  by_content,
  of_files,
  of_own_folders,
  of_texts,
)
from diffusion_jax.errors import UserError


def open_captioned(config: DataConfig) -> tuple['FolderSource', 'FolderSource']:
  """(train, test) of 'folder:PATH' with captions.

  UserError: no such folder, no picture, a picture without caption, or an unreadable list of
  captions.
  """
  root, left = _root(config), Left()
  files, splits = _found(root, left)
  pictures = [path for _, part in splits for path in part]
  captions = iter(captions_of(files, pictures, root, config.caption, config.caption_column, left))
  sources = [
    FolderSource(folder, part, config.size, [next(captions) for _ in part])
    for folder, part in splits
  ]
  return _train_and_test(sources, config, left)


def open_labelled(config: DataConfig) -> tuple['FolderSource', 'FolderSource']:
  """(train, test) of 'folder:PATH' with classes; UserError: no folder, no pictures in classes."""
  root, left = _root(config), Left()
  files, splits = _found(root, left)
  for path in files:
    if path.suffix.lower() not in SUFFIXES:
      left.add(f'files of another kind ({path.suffix or "no suffix"})', path.relative_to(root))
  sources = []
  for folder, part in splits:
    part = _in_classes(part, folder, left)
    labels = [key_of(path.relative_to(folder).parts[0]) for path in part]
    sources.append(FolderSource(folder, part, config.size, labels=labels))
  return _train_and_test(sources, config, left)


def open_all(root: Path, size: int, caption: str) -> 'FolderSource':
  """Return all pictures of a folder. UserError as `open_captioned`."""
  left = Left()
  files = _files_of(root, left)
  pictures = with_suffixes(files)
  captions = captions_of(files, pictures, root, caption, '', left)
  return FolderSource(root, pictures, size, captions, notes=left.notes(root))


def _root(config: DataConfig) -> Path:
  return Path(config.dataset.removeprefix('folder:'))


def _files_of(root: Path, left: Left) -> list[Path]:
  """All files of a folder of pictures. UserError where it has no picture, or is none."""
  if not root.is_dir():
    raise UserError(f'there is no folder {root}; give data.dataset=folder:PATH of pictures.')
  files = find_files(root, left)
  if not with_suffixes(files):
    found = f', but {"; ".join(left.sentences())}' if left.sentences() else ''
    raise UserError(f'the folder {root} has no picture ({", ".join(SUFFIXES)}){found}; add some.')
  return files


def _found(root: Path, left: Left) -> tuple[list[Path], list[tuple[Path, list[Path]]]]:
  """All files, and (folder, its pictures) of each split that is one; `left` notes others."""
  files = _files_of(root, left)
  pictures = with_suffixes(files)
  folders = [folder for folder in own_splits(pictures, root) if folder]
  splits = [(folder, [p for p in pictures if p.is_relative_to(folder)]) for folder in folders]
  if len(splits) > 1:
    names = ' and '.join(folder.name for folder in folders)
    for path in sorted(set(pictures).difference(*(part for _, part in splits))):
      left.add(f'pictures outside of {names}', path.relative_to(root))
  return files, splits


def _in_classes(pictures: Sequence[Path], folder: Path, left: Left) -> list[Path]:
  """Pictures in folders of `folder`."""
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


def _train_and_test(
  sources: list['FolderSource'], config: DataConfig, left: Left
) -> tuple['FolderSource', 'FolderSource']:
  """The two as they are, or a single one split by content."""
  train, *others = sources
  train.notes = left.notes(_root(config))
  if others:
    (test,) = others
    test.measured = of_own_folders(train.files, test.files)
    return train, test
  parts = by_content(train.files, config.test_fraction, train.labels or ())
  return train.part(parts.train, parts.measured), train.part(parts.test, parts.measured)


class FolderSource:
  """Records of pictures in a folder; image uint8 [size size 3], the central square.

  With captions a record has 'sizes', float32 [6], as SDXL: height and width of the upright picture,
  top and left of the square once the shorter edge is `size`, and the size twice. With labels it has
  'label', also its caption. notes: what is not used. measured: what scores are measured on.
  """

  def __init__(
    self, folder: Path, files: Sequence[Path], size: int,
    captions: Sequence[list[str]] | None = None, labels: Sequence[str] | None = None,
    notes: tuple[str, ...] = (),
  ):
    self.folder, self.files, self.size = folder, list(files), size
    self.captions, self.labels, self.notes, self.measured = captions, labels, notes, APART

  def part(self, numbers: Sequence[int], measured: Measured) -> 'FolderSource':
    """Return a source of these records alone."""
    part = copy.copy(self)
    for name in ('files', 'captions', 'labels'):
      if (values := getattr(self, name)) is not None:
        setattr(part, name, [values[i] for i in numbers])
    part.measured = measured
    return part

  def fingerprint(self) -> dict[str, str]:
    """Return hashes that change with the pictures and their classes, or with their captions."""
    captions = {} if self.captions is None else {'captions': of_texts(self.captions)}
    return {'pictures': of_files(self.files, self.folder), **captions}

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: SupportsIndex) -> dict:
    """Return record `index`. Unreadable where the picture cannot be read."""
    index = range(len(self.files))[index]
    file = self.files[index]
    name = key_of(file.relative_to(self.folder).with_suffix('').as_posix())
    image, (height, width) = read_square(file, self.size)
    record = {'image': image, 'id': name}
    if self.labels is not None:
      return record | {'captions': [self.labels[index]], 'label': self.labels[index]}
    scale = self.size / min(height, width)
    offset = lambda edge: (round(edge * scale) - self.size) // 2
    sizes = (height, width, offset(height), offset(width), self.size, self.size)
    return record | {'captions': self.captions[index], 'sizes': np.asarray(sizes, np.float32)}


class Alternating:
  """Two sources in turn, the shorter one repeated: the subject, and its class.

  'weight' is 2 for the first and twice `weight` for the second: the mean over an even mixture is
  the sum of both means.
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
