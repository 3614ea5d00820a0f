"""The source of pictures, whatever holds them: decoded, cut, and with their texts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.decoding import Decoders, here
from diffusion_jax.data.images import read_covering, read_middle, read_pixels
from diffusion_jax.data.sources.entries import Entries, Entry
from diffusion_jax.data.splits import APART, Measured, by_content, of_own_splits
from diffusion_jax.errors import Unreadable, UserError


class PictureSource(Sequence):
  """Records of `Entries`: 'image', uint8 [h w 3], 'captions' and 'id', and what the entries have
  of 'label' and 'caption_weights'.

  With a size the image is scaled until it covers that, and its middle cut out (`read_middle`);
  'sizes', float32 [6], are height and width of the upright picture, top and left of the image in
  it once it is scaled, and the size, as SDXL takes them. Without one pictures are as they are.

  entries: shared by all parts. numbers: of the entries that are records, in order; all by default.
  shape: (height, width) of the images. notes: what is not used, for people. measured: what scores
  on it are measured on. credit: whom to thank.
  """

  def __init__(
    self, entries: Entries, shape: tuple[int, int] | None = None,
    numbers: np.ndarray | None = None, *, notes: tuple[str, ...] = (), credit: str = '',
    measured: Measured = APART,
  ):
    self.entries, self.notes, self.credit, self.measured = entries, notes, credit, measured
    self.numbers = np.arange(len(entries)) if numbers is None else np.asarray(numbers, np.int64)
    self._need_labels, self._background, self._uncut = False, 'white', False
    self._call: Callable = here
    # One row for each record, or one for all.
    self.shapes = None if shape is None else np.asarray([shape], np.int32)

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index`. Unreadable where its picture or its texts cannot be read."""
    index = range(len(self))[index]
    entry = self._checked(self.entries[int(self.numbers[index])])
    if self.shapes is None:
      record: dict[str, Any] = {
        'image': self._call(read_pixels, entry.source, entry.where, self._background)
      }
    elif self._uncut:
      record = self._whole(entry, self._shape(index))
    else:
      shape = self._shape(index)
      image, own = self._call(
        read_middle, entry.source, *shape, entry.where, self._background
      )
      record = {'image': image, 'sizes': sizes_of(own, shape)}
    return record | _texts(entry)

  def about(self, index: SupportsIndex) -> dict[str, Any]:
    """Return record `index` without its picture, which is not decoded. Unreadable."""
    number = int(self.numbers[range(len(self))[index]])
    return _texts(self._checked(self.entries.about(number)))

  def _checked(self, entry: Entry) -> Entry:
    if self._need_labels and entry.label is None:
      raise Unreadable(f'the picture {entry.where} has no label; give it one.', 'no label')
    return entry

  def _whole(self, entry: Entry, shape: tuple[int, int]) -> dict[str, Any]:
    image, own, frame = self._call(
      read_covering, entry.source, *shape, entry.where, self._background
    )
    size = image.shape[:2]
    corner = (round((whole - edge) / 2) for whole, edge in zip(frame, size, strict=True))
    return {
      'image': image, 'cut': np.asarray(shape, np.int32),
      'sizes': np.asarray((*own, *corner, *size), np.float32),
      'frame': np.asarray(frame, np.float32),
    }

  def _shape(self, index: int) -> tuple[int, int]:
    height, width = self.shapes[index if len(self.shapes) > 1 else 0]
    return int(height), int(width)

  @property
  def labels(self) -> list[str] | None:
    """The labels of all records that have one, in order; None without, or UserError."""
    return None if self.entries.labels is None else [each for each in self._labels() if each]

  def _labels(self) -> list[str]:
    labels = self.entries.labels
    return [] if labels is None else [labels[i] for i in self.numbers.tolist()]

  def part(self, numbers: Sequence[int], measured: Measured) -> 'PictureSource':
    """A source of these records alone, in this order."""
    part = copy.copy(self)
    numbers = np.asarray(numbers, np.int64)
    part.numbers, part.measured = self.numbers[numbers], measured
    if self.shapes is not None and len(self.shapes) > 1:
      part.shapes = self.shapes[numbers]
    return part

  def at_sizes(self, shapes: np.ndarray) -> 'PictureSource':
    """A source whose record i is read at shapes[i], (height, width), int32 [n 2]."""
    if shapes.shape != (len(self), 2):
      raise ValueError(f'{shapes.shape} are not sizes for {len(self)} records')
    other = copy.copy(self)
    other.shapes = np.asarray(shapes, np.int32)
    return other

  def original_sizes(self) -> np.ndarray:
    """(height, width) of the upright pictures, int32 [n 2]; 0 0 of what cannot be read.

    Headers alone are read, and none where the entries know.
    """
    return self.entries.original_sizes(self.numbers)

  def hashes(self, records: np.ndarray | None = None) -> np.ndarray:
    """Digests of pictures as they were stored, uint8 [n 16]: of length, start and end; of all, or
    of these records."""
    return self.entries.hashes(self.numbers if records is None else self.numbers[records])

  def fingerprint(self) -> dict[str, str]:
    """Hashes that change with the pictures and their classes, or with their captions."""
    return self.entries.fingerprint(self.numbers)

  def uncut(self) -> 'PictureSource':
    """This source, with pictures that are scaled and not cut: `transforms.RandomCut` is for that.
    """
    other = copy.copy(self)
    other._uncut = True
    return other

  def read_by(self, background: str, decoders: Decoders | None = None) -> 'PictureSource':
    """This source, with transparent places over a color, by name, decoded in other processes."""
    other = copy.copy(self)
    other._background, other._call = background, decoders or here
    return other

  def labelled(self, what: str) -> 'PictureSource':
    """This source, for what needs labels: records without one are unreadable. UserError: all are.
    """
    if not self.labels:
      raise UserError(f'{what} needs labels, but {self.entries.where} has none; use another.')
    other = copy.copy(self)
    other._need_labels = True
    return other

  def halves(self, fraction: float) -> tuple['PictureSource', 'PictureSource']:
    """(train, test), split by content; fraction: of the test."""
    parts = by_content(len(self), self.hashes, fraction, self._labels())
    return self.part(parts.train, parts.measured), self.part(parts.test, parts.measured)


def _texts(entry: Entry) -> dict[str, Any]:
  captions = [entry.label] if entry.captions is None else list(entry.captions)
  weights = {'caption_weights': list(entry.weights)} if entry.weights else {}
  label = {} if entry.label is None else {'label': entry.label}
  return {'captions': captions, **weights, 'id': entry.name, **label}


def sizes_of(own: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
  """What SDXL is told of a picture whose middle was cut out, float32 [6]: see `PictureSource`."""
  scale = max(wanted / edge for wanted, edge in zip(shape, own, strict=True))
  offsets = ((round(edge * scale) - wanted) // 2 for wanted, edge in zip(shape, own, strict=True))
  return np.asarray((*own, *offsets, *shape), np.float32)


def train_and_test(
  parts: Mapping[str, Entries], config: DataConfig, *, notes: tuple[str, ...] = (),
  credit: str = '', measured: Measured = APART,
) -> tuple[PictureSource, PictureSource]:
  """The sources of 'train' and 'test', or of one of them alone, split by content."""
  train, *others = (
    PictureSource(parts[name], config.shape, notes=notes, credit=credit)
    for name in ('train', 'test') if name in parts
  )
  if not others:
    return train.halves(config.test_fraction)
  test = others[0]
  test.measured = measured
  if measured == APART:
    test.measured = of_own_splits(len(test), test.entries.also_in(train.entries))
  return train, test
