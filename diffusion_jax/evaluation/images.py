"""Sets of images to evaluate, at their own sizes: folders, tar files, prepared data, batches."""

import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from diffusion_jax.data.finding import SUFFIXES, Left, find_files, with_suffixes
from diffusion_jax.data.image_sets import ImageBatch, TarPictures, holds_batch
from diffusion_jax.data.images import read_pixels
from diffusion_jax.data.sources.tfds import METADATA, PreparedImages
from diffusion_jax.data.splits import fingerprint, of_records
from diffusion_jax.data.unreadable import first_readable
from diffusion_jax.errors import UserError
from diffusion_jax.runs.trained_on import DataSplit, split_of
from diffusion_jax.types import Record


class Picture(NamedTuple):
  """pixels: uint8 [h w 3]. caption: '' where there is none."""

  pixels: np.ndarray
  caption: str = ''


class ImageSet(Protocol):
  """Images by number. name: for people; stamp: changes with their files; notes: omissions."""

  name: str
  stamp: str
  notes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Picture:
    """Return image `index`. UserError where it cannot be read."""
    ...


class Folder:
  """All pictures below a folder, in the order of their paths; UserError for none."""

  def __init__(self, folder: str | Path):
    root, left = Path(folder), Left()
    self.files = with_suffixes(find_files(root, left))
    self.notes = left.notes(root)
    if not self.files:
      raise UserError(
        f'the folder {root} has no picture ({", ".join(SUFFIXES)}){_but(self.notes)}.'
      )
    self.name = f'folder:{root.resolve()}'
    self.stamp = stamp_of(self.files, root)

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Picture:
    return Picture(read_pixels(self.files[index]))


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Images without captions, such as `data.image_sets.TarPictures`."""

  pictures: Sequence[np.ndarray]
  name: str
  stamp: str = ''
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.pictures)

  def __getitem__(self, index: int) -> Picture:
    return Picture(self.pictures[index])


@dataclasses.dataclass(frozen=True)
class Split:
  """One split of a data set, with the first caption of each record; pictures: what they are."""

  records: Sequence
  name: str
  notes: tuple[str, ...] = ()
  pictures: DataSplit | None = None

  def __len__(self) -> int:
    return len(self.records)

  @functools.cached_property
  def stamp(self) -> str:
    """Checksum of the records, for a folder may have got other pictures since."""
    found = fingerprint(self.records) or of_records(self.records)
    return f'{zlib.crc32(json.dumps(found).encode()):08x}'

  def __getitem__(self, index: int) -> Picture:
    record = self.records[index]
    return Picture(record['image'], record['captions'][0])


def named_split(source: Sequence[Record], dataset: str, size: int, name: str) -> Split:
  """Return a split of a data set that knows which it is; of another size it is another one."""
  return Split(
    source, f'{dataset} {size} px {name}',
    pictures=split_of(dataset, name, size, len(source), fingerprint(source)),
  )


def shuffled(source: Sequence[Record], count: int) -> list[Record]:
  """A random subset of `count` readable records, the same for each length of source."""
  return first_readable(source, count, np.random.default_rng(0).permutation(len(source)))


@dataclasses.dataclass(frozen=True)
class RandomSubset:
  """A random subset of a set of images, the same for each length and count."""

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

  @property
  def stamp(self) -> str:
    return self.images.stamp

  @property
  def notes(self) -> tuple[str, ...]:
    return self.images.notes

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Picture:
    order = np.random.default_rng(0).permutation(len(self.images))
    return self.images[int(order[index])]


KNOWN = (
  f'a folder of pictures ({", ".join(SUFFIXES)}), a tar file or a folder of them, the folder of a '
  "prepared data set (FOLDER:SPLIT), or ADM's npz with images as arr_0"
)


def open_images(path: str | Path) -> ImageSet:
  """The images at a path, by its content; UserError unless exactly one kind of KNOWN fits."""
  place = Path(path)
  if place.is_dir():
    return _in_folder(place)
  if place.suffix.lower() == '.tar' and place.is_file():
    pictures = TarPictures([place])
    return Pixels(pictures, f'tar:{place.resolve()}', stamp_of([place]), pictures.notes)
  if holds_batch(place):
    return Pixels(ImageBatch(place), f'npz:{place.resolve()}', stamp_of([place]))
  if place.is_file():
    raise UserError(f'{place} holds no images; give {KNOWN}.')
  for colon in re.finditer(':', str(path)):  # A slice of a split may have one, too.
    folder = Path(str(path)[: colon.start()])
    if (folder / METADATA).is_file():
      return _prepared(folder, str(path)[colon.end() :])
  raise UserError(f'there are no images at {place}; give {KNOWN}.')


def holds_images(file: str | Path) -> bool:
  """True if a file holds images rather than statistics: a tar file, or an npz with arr_0."""
  return Path(file).suffix.lower() == '.tar' or holds_batch(file)


def _in_folder(folder: Path) -> ImageSet:
  if (folder / METADATA).is_file():
    return _prepared(folder)
  left = Left()
  files = with_suffixes(find_files(folder, left), (*SUFFIXES, '.tar'))
  archives, notes = with_suffixes(files, ('.tar',)), left.notes(folder)
  if not files:
    raise UserError(f'there are no images in {folder}{_but(notes)}; give {KNOWN}.')
  if not archives:
    return Folder(folder)
  if len(archives) < len(files):
    raise UserError(f'{folder} has both pictures and tar files; move one kind elsewhere.')
  pictures = TarPictures(archives)
  return Pixels(
    pictures, f'tar:{folder.resolve()}', stamp_of(archives, folder), notes + pictures.notes
  )


def _but(notes: Sequence[str]) -> str:
  return f' ({notes[0].rstrip(".")})' if notes else ''


def _prepared(folder: Path, split: str = '') -> ImageSet:
  images = PreparedImages(folder, split)
  files = sorted(path for path in folder.iterdir() if path.is_file())
  return Pixels(images, f'prepared:{folder.resolve()}:{images.split}', stamp_of(files, folder))


def stamp_of(files: Sequence[Path], folder: Path | None = None) -> str:
  """Return the number of files and bytes, and a checksum of names, sizes and times of change."""
  found = [
    (str(path.relative_to(folder or path.parent)), stat.st_size, stat.st_mtime_ns)
    for path, stat in ((path, path.stat()) for path in files)
  ]
  checksum = zlib.crc32(json.dumps(found).encode())
  return f'{len(found)} files, {sum(size for _, size, _ in found)} bytes, {checksum:08x}'
