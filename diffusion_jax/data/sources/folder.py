"""Folders of pictures, with captions or by class.

Captions are the lines of the text file beside a picture (cat.png, cat.txt), or those of cat.json,
or its row in metadata.jsonl ({"file_name": "cat.png", "text": "a cat"}), metadata.csv or
metadata.parquet, or those given for all, such as '{name}', of words of the path.
The class is the folder below the root (PATH/cat/1.png). Folders may be nested. Folders train/ and
test/ are the splits; without them pictures are split by content.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.captions import Texts, captions_of, check_characters
from diffusion_jax.data.fields import Caption, weights_of
from diffusion_jax.data.finding import (
  SUFFIXES,
  Left,
  find_files,
  key_of,
  own_splits,
  with_suffixes,
)
from diffusion_jax.data.sources.entries import Classes, Entries, Entry
from diffusion_jax.data.sources.file_hashes import KeptHashes
from diffusion_jax.data.sources.index import Names
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.splits import file_hash, of_files, of_own_splits, of_texts, size_of
from diffusion_jax.data.storage import is_remote
from diffusion_jax.errors import UserError


def open_captioned(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'folder:PATH' with captions.

  UserError: no such folder, no picture, a picture without caption, or an unreadable list of
  captions.
  """
  root, left = _root(config), Left()
  files, splits = _found(root, left)
  pictures = [path for _, part in splits for path in part]
  captions = iter(captions_of(files, pictures, root, config.caption, config.caption_column, left))
  sources = [
    PictureSource(Files(folder, part, [next(captions) for _ in part]), config.shape)
    for folder, part in splits
  ]
  return _train_and_test(sources, config, left)


def open_labelled(config: DataConfig) -> tuple[PictureSource, PictureSource]:
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
    sources.append(PictureSource(Files(folder, part, labels=labels), config.shape))
  return _train_and_test(sources, config, left)


def open_all(root: Path, size: tuple[int, int], caption: str) -> PictureSource:
  """Return all pictures of a folder. UserError as `open_captioned`."""
  left = Left()
  files = _files_of(root, left)
  pictures = with_suffixes(files)
  captions = captions_of(files, pictures, root, caption, '', left)
  return PictureSource(Files(root, pictures, captions), size, notes=left.notes(root))


def _root(config: DataConfig) -> Path:
  place = config.dataset.removeprefix('folder:')
  if is_remote(place):
    raise UserError(
      f'{config.dataset} is a URL, where files are found too slowly one by one; copy the folder '
      'here, or pack it and give tar:URL.'
    )
  return Path(place)


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
  sources: list[PictureSource], config: DataConfig, left: Left
) -> tuple[PictureSource, PictureSource]:
  """The two as they are, or a single one split by content."""
  (train, *others), root = sources, _root(config)
  train.notes = left.notes(root)
  if others:
    (test,) = others
    test.measured = of_own_splits(len(test), test.entries.also_in(train.entries))
    return train, test
  train.entries.kept = KeptHashes(root.absolute(), config)
  return train.halves(config.test_fraction)


class Paths(Sequence[Path]):
  """Files below a folder, for a million of which objects would take ten times the memory."""

  def __init__(self, files: Sequence[Path], folder: Path):
    start = len(folder.as_posix().rstrip('/')) + 1 if folder != Path() else 0
    self._folder = folder
    self._names = Names(*Names.columns([path.as_posix()[start:] for path in files]))

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Path:
    return self._folder / self._names[range(len(self))[index]]


class Files(Entries):
  """Pictures in files below a folder; with labels these are their captions too."""

  quick = 100_000

  def __init__(
    self, folder: Path, files: Sequence[Path], captions: Sequence[list[Caption]] | None = None,
    labels: Sequence[str] | None = None,
  ):
    self.folder, self.files = folder, Paths(files, folder)
    self.labels = None if labels is None else Classes.of(labels)
    self.where = f'the folder {folder}'
    self.captions = None if captions is None else Texts(captions)
    self.kept: KeptHashes | None = None

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Entry:
    file = self.files[index]
    if self.labels is not None:
      return Entry(self.name(index), str(file), file, label=self.labels[index])
    captions = self.captions[index]
    texts = [caption.text for caption in captions]
    return Entry(self.name(index), str(file), file, texts, weights_of(captions))

  def name(self, index: int) -> str:
    """The path below the folder, without its suffix."""
    return key_of(self.files[index].relative_to(self.folder).with_suffix('').as_posix())

  def hash(self, index: int) -> bytes:
    return file_hash(self.files[index])

  def hashes(self, numbers: np.ndarray) -> np.ndarray:
    """Digests of pictures, uint8 [n DIGEST]; files that are as they were are not read again."""
    if self.kept is None:
      return self.read_hashes(numbers)
    return self.kept(self.files, np.asarray(numbers), self.read_hashes)

  def lengths(self) -> np.ndarray:
    """Bytes of each file; -1 of one that is gone."""
    return np.fromiter(map(size_of, self.files), np.int64, len(self))

  def fingerprint(self, numbers: np.ndarray) -> dict[str, str]:
    captions = {} if self.captions is None else {
      'captions': of_texts(_hashable(self.captions[i]) for i in numbers)
    }
    return {'pictures': of_files([self.files[i] for i in numbers], self.folder), **captions}


def _hashable(captions: Sequence[Caption]) -> list:
  texts, weights = [caption.text for caption in captions], weights_of(captions)
  return [texts, weights] if weights else texts


class Alternating:
  """Two sources in turn, the shorter one repeated: the subject, and its class.

  'weight' is 2 for the first and twice `weight` for the second: the mean over an even mixture is
  the sum of both means.
  """

  def __init__(self, subject: Sequence, other: Sequence, weight: float):
    self.sources, self.weights = (subject, other), (2.0, 2.0 * weight)
    self.credit = getattr(subject, 'credit', '')

  def __len__(self) -> int:
    return 2 * max(map(len, self.sources))

  def kind(self, index: int) -> range:
    """The records that are of the same one of the two."""
    return range(index % 2, len(self), 2)

  def __getitem__(self, index: SupportsIndex) -> dict:
    index = range(len(self))[index]
    which, place = index % 2, index // 2
    source = self.sources[which]
    return source[place % len(source)] | {'weight': np.float32(self.weights[which])}

  def original_sizes(self) -> np.ndarray:
    """(height, width) of the pictures, int32 [n 2]; see `PictureSource`."""
    half = np.arange(len(self) // 2)
    both = [source.original_sizes()[half % len(source)] for source in self.sources]
    return np.stack(both, axis=1).reshape(-1, 2)

  def uncut(self) -> 'Alternating':
    """Both with their records uncut."""
    other = copy.copy(self)
    other.sources = tuple(source.uncut() for source in self.sources)
    return other

  def at_sizes(self, shapes: np.ndarray) -> 'Alternating':
    """Both with their records at these sizes, int32 [n 2], of repeated ones the first."""
    other = copy.copy(self)
    other.sources = tuple(
      source.at_sizes(shapes[which::2][: len(source)]) for which, source in enumerate(self.sources)
    )
    return other
