"""Random access to records: prepared data sets on disk, and columns in memory."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np

from diffusion_jax.data.fingerprint import IMAGES, RECORDS, of_images, of_texts, spread
from diffusion_jax.data.images import read_pixels
from diffusion_jax.data.prepare import is_prepared, make_builder
from diffusion_jax.data.prepare import prepare as prepare_dataset
from diffusion_jax.data.prepared_metadata import check_shards
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import reading
from diffusion_jax.types import Record


def open_source(
  dataset: str, split: str, *, size: int, data_dir: str | None = None, prepare: bool = False
) -> 'ImageSource':
  """Opens one split of a prepared data set.

  Args:
    dataset: name of the data set, such as 'openmoji'.
    split: 'train', 'test', or a TFDS slice such as 'train[:100]'.
    size: image edge in pixels.
    data_dir: folder for all data sets; see `prepare.prepare`.
    prepare: prepare the data set first where it is missing.

  Raises:
    UserError: unknown name, size or split, missing data, or data that cannot be read.
  """
  if prepare:
    prepare_dataset(dataset, size, data_dir)
  builder = make_builder(dataset, size, data_dir)
  if not is_prepared(builder):
    folder = f' --data_dir {data_dir}' if data_dir else ''
    raise UserError(
      f'The data set {dataset} at {size} px is not in {builder.data_dir}: '
      f'run python -m diffusion_jax prepare --dataset {dataset} --size {size}{folder}'
    )
  _check_split(builder, dataset, split)
  name = f'{dataset} in {builder.data_dir}'
  with _reading(name):
    import tensorflow_datasets as tfds

    check_shards(builder.data_dir, builder.info.splits[split])
    # Pillow decodes: TFDS would ask for OpenCV, and damaged images must be named.
    decoders = {'image': tfds.decode.SkipDecoding()}
    return ImageSource(builder.as_data_source(split=split, decoders=decoders), name)


class ImageSource:
  """Records of a TFDS data source as `types.Record`. Pickles, so worker processes can read it."""

  def __init__(self, records: Sequence[Mapping[str, Any]], name: str):
    self._records = records
    self._name = name
    self._length = len(records)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: SupportsIndex) -> Record:
    """Record `index`.

    Raises:
      IndexError: no such record.
      Unreadable: the record is damaged, or the file that it is in.
    """
    index = _checked(index, self._length)
    with _reading(f'{index} of {self._name}', Unreadable):
      raw = self._records[index]
      image, group = raw['image'], {'label': raw['group'].decode()} if 'group' in raw else {}
      texts = {'captions': [text.decode() for text in raw['captions']], 'id': raw['id'].decode()}
    return {'image': read_pixels(io.BytesIO(image), f'{index} of {self._name}'), **texts, **group}

  @property
  def labels(self) -> list[str]:
    """Of every record, in order; no image is decoded. UserError where there are none."""
    with _reading(self._name):
      try:
        return [raw['group'].decode() for raw in self._records]
      except KeyError:
        raise UserError(f'The data set {self._name} has no labels: use another.') from None

  def fingerprint(self) -> dict[str, str]:
    """Changes with texts, and with pixels, of records all over the split; not with the way in
    which they are compressed."""

    return {
      'captions': of_texts([self._texts(i) for i in spread(self._length, RECORDS)]),
      'pictures': of_images([self._pixels(i) for i in spread(self._length, IMAGES)]),
    }

  def _texts(self, index: int) -> list[list[str]] | None:
    """All texts of a record; None of one that cannot be read."""
    try:
      raw = self._records[index]
      return [[text.decode() for text in np.atleast_1d(raw[name]).tolist()]
              for name in ('id', 'captions', 'group') if name in raw]
    except Exception:  # ArrayRecord raises bare ones from C++.
      return None

  def _pixels(self, index: int) -> np.ndarray:
    try:
      return self[index]['image']
    except UserError:
      return np.zeros((0, 0, 3), np.uint8)

  def __repr__(self) -> str:
    return f'ImageSource({self._name}, {self._length} records)'


class ArraySource:
  """Rows of in-memory columns, such as cached latents with their text embeddings.

  Args:
    columns: by name, arrays [n, ...] or lists of n values.
    unreadable: why there is nothing in some of the rows.

  Raises:
    UserError: no columns, or columns of different lengths.
  """

  def __init__(
    self, columns: Mapping[str, np.ndarray | list],
    unreadable: Mapping[int, str] = MappingProxyType({}),
  ):
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
      raise UserError(f'Columns must have one common length, got {lengths}: fix the longer ones.')
    self._columns, self._unreadable = dict(columns), dict(unreadable)
    self._length = next(iter(lengths.values()))

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    """Row `index` as one value per column. Unreadable where there is nothing in it."""
    index = _checked(index, self._length)
    if index in self._unreadable:
      raise Unreadable(self._unreadable[index])
    return {name: column[index] for name, column in self._columns.items()}

  def __repr__(self) -> str:
    return f'ArraySource({", ".join(self._columns)}, {self._length} rows)'


def _check_split(builder: Any, dataset: str, split: str) -> None:
  try:
    builder.info.splits[split]
  except (KeyError, ValueError) as error:
    known = ', '.join(sorted(builder.info.splits))
    raise UserError(
      f"{dataset} has no split {split!r}: use one of {known}, or a slice such as 'train[:100]'."
    ) from error


def _checked(index: SupportsIndex, length: int) -> int:
  position = index.__index__()
  if not -length <= position < length:
    raise IndexError(f'no record {position} in {length}')
  return position % length


@contextlib.contextmanager
def _reading(name: str, kind: type[UserError] = UserError) -> Iterator[None]:
  folder = Path(name.rpartition(' in ')[2])
  try:
    with reading(f'The data set {name}', remedy=f'delete {folder} and prepare it again'):
      yield
  except UserError as error:
    raise kind(str(error)) from error
