"""Data sets that TFDS has prepared as ArrayRecord: made, checked, and read at random.

TFDS imports the module of any class that `features.json` or `dataset_info.json` names, and builds
paths from names in them: both are checked before TFDS reads them.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data.images import read_pixels
from diffusion_jax.data.sources import OF_FOLDERS, square_of, without_effect
from diffusion_jax.data.sources.entries import Entries, Entry
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.splits import IMAGES, RECORDS, of_images, of_texts, spread
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import bounded_bytes, first_line, read_object, reading

METADATA, FEATURES = 'dataset_info.json', 'features.json'
MOST_SHARDS = 100_000
REMEDY = 'prepare the data set again'
_SHIPPED = 'tensorflow_datasets.core.features.'
_NAME = re.compile(r'\w[\w.+-]{0,199}')
_MODULE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,50}', re.ASCII)
_PLACEHOLDER = re.compile(r'\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}')
_TEMPLATE = re.compile(r'[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*')


def check_metadata(folder: str | Path) -> None:
  """Read all metadata of a prepared data set and refuse what could do harm.

  UserError: a missing or damaged file, a class that TFDS does not ship, a path out of the folder,
  another format than ArrayRecord, or an impossible number of records.
  """
  folder = Path(folder)
  info = read_object(folder / METADATA, remedy=REMEDY)
  with reading(folder / METADATA, remedy=REMEDY):
    _check_classes(folder / METADATA, info.get('features', {}))
    _check_info(folder / METADATA, info)
  if (folder / FEATURES).exists():
    features = read_object(folder / FEATURES, remedy=REMEDY)
    with reading(folder / FEATURES, remedy=REMEDY):
      _check_classes(folder / FEATURES, features)
      _check_keys(folder / FEATURES, features)
  # TFDS reads them whole, whatever they are.
  for path in folder.rglob('*.labels.txt'):
    bounded_bytes(path)


def check_shards(folder: str | Path, split: Any) -> None:
  """Check that the files of a split (whole or a part) can hold their records.

  UserError: a file lies elsewhere, is missing, or is smaller than its number of records.
  """
  def bad(why: str) -> UserError:
    return UserError(f'the data set in {folder} cannot be read ({why}); prepare it again.')

  for part in split.file_instructions:
    path = Path(part.filename)
    if not path.is_relative_to(Path(folder)) or '..' in path.parts:
      raise bad(f'it names the file {path}, which is elsewhere')
    if not path.is_file():
      raise bad(f'it has no file {path.name}')
    size = path.stat().st_size
    if not 0 <= part.skip <= part.skip + part.take <= part.examples_in_shard <= size:
      raise bad(f'{path.name} has {size:,} bytes for {part.examples_in_shard:,} records')


def _check_classes(path: Path, features: Any) -> None:
  """UserError for a class of features that TFDS would have to import."""
  from tensorflow_datasets.core.features.feature import FeatureConnector

  # The table by which TFDS itself decides whether to import anything.
  known = {
    name for name, found in FeatureConnector._registered_features.items()
    if name.startswith(_SHIPPED) and found.__module__.startswith(_SHIPPED)
  }
  for key, value in _items(features):
    # Both spellings of protocol buffers, and that of older versions; a feature may be called type.
    plain = key.replace('_', '').lower()
    names = plain in ('pythonclassname', 'type') and not isinstance(value, dict)
    if names and not (isinstance(value, str) and value in known):
      raise UserError(
        f'{path} names the class {str(value)[:200]!r}, which TFDS would import and run; only its '
        f'own classes of {_SHIPPED}* may be named.'
      )


def _check_keys(path: Path, features: Any) -> None:
  """TFDS looks for files whose names begin with the name of a feature."""
  for key, _ in _items(features):
    if '..' in key or key.startswith('/') or re.search(r'[\\*?\[\]\x00-\x1f]', key):
      raise UserError(f'{path} has a feature named {key[:200]!r}; use letters, digits and _.')


def _check_info(path: Path, values: dict[str, Any]) -> None:
  """Name, formats and numbers of dataset_info.json, as TFDS reads it."""
  from google.protobuf import json_format
  from tensorflow_datasets.core.proto import dataset_info_pb2

  def check(good: Any, what: str) -> None:
    if not good:
      raise UserError(f'{path} has {what}; prepare the data set again.')

  info = json_format.ParseDict(values, dataset_info_pb2.DatasetInfo())
  for name in (info.name, info.config_name):
    check(not name or _is_name(name), f'the name {name[:200]!r}, which is no plain one')
  module = info.module_name
  check(not module or _MODULE.fullmatch(module), f'the module {module[:200]!r}, which is none')
  formats = {info.file_format, *info.alternative_file_formats}
  check(
    'array_record' in formats and formats <= {'array_record', 'tfrecord'},
    f'the format {", ".join(sorted(formats))[:200]!r}, where ArrayRecord alone is read',
  )
  check(info.splits, 'no splits')
  for split in info.splits:
    check(_is_name(split.name), f'a split named {split.name[:200]!r}')
    template = split.filepath_template
    check(
      not template or _is_template(template),
      f'the file name {template[:200]!r}, which is not one of a file within the folder',
    )
    check(min(split.shard_lengths, default=0) >= 0, 'a negative number of records')
  count = sum(len(split.shard_lengths) for split in info.splits)
  check(count <= MOST_SHARDS, f'{count:,} files of records, where {MOST_SHARDS:,} are allowed')


def _is_name(name: str) -> bool:
  return bool(_NAME.fullmatch(name)) and '..' not in name


def _is_template(template: str) -> bool:
  """Return whether it is a relative path with TFDS's own placeholders and no format of Python."""
  filled = _PLACEHOLDER.sub('X', template)
  return bool(_TEMPLATE.fullmatch(filled)) and '..' not in filled


def _items(value: Any) -> Iterator[tuple[str, Any]]:
  """Every key with its value, however deep, also in texts that are JSON themselves."""
  stack = [value]
  while stack:
    value = stack.pop()
    if isinstance(value, str) and value.lstrip()[:1] in ('{', '['):
      try:
        value = json.loads(value)
      except ValueError:  # Neither can TFDS read it.
        continue
    if isinstance(value, dict):
      yield from value.items()
      stack += value.values()
    elif isinstance(value, list):
      stack += value


_ENVIRONMENT = 'DIFFUSION_JAX_DATA'


def default_data_dir() -> str:
  """Return the folder of all data sets where none is given."""
  return os.environ.get(_ENVIRONMENT) or str(Path.home() / '.cache' / 'diffusion_jax' / 'data')


def _openmoji(size: int, data_dir: str) -> Any:
  from diffusion_jax.data.sources.openmoji.builder import Openmoji

  return Openmoji(config=str(size), data_dir=data_dir, file_format='array_record')


OPENMOJI = (
  'Images: OpenMoji, the open-source emoji and icon project, https://openmoji.org, licence '
  'CC BY-SA 4.0. Captions: names from the `emoji` package and from OpenMoji.'
)
DATASETS = {'openmoji': (_openmoji, (32, 64, 128, 16), OPENMOJI)}
"""By name: how to make the builder from (size, data_dir), the sizes there are, whom to thank."""


def make_builder(dataset: str, size: int, data_dir: str | None = None) -> Any:
  """The TFDS builder of a data set, prepared or not; dataset: a key of DATASETS, size: in pixels.

  data_dir: folder of all data sets; default $DIFFUSION_JAX_DATA, else ~/.cache/diffusion_jax/data.
  UserError: unknown data set or size, or an invalid data set on disk.
  """
  if dataset not in DATASETS:
    known = ', '.join(sorted(DATASETS))
    raise UserError(f'Unknown data set {dataset!r}: use one of {known}.')
  make, sizes, _ = DATASETS[dataset]
  if size not in sizes:
    raise UserError(f'{dataset} has no size {size!r}: use one of {", ".join(map(str, sizes))}.')
  root = str(Path(data_dir or default_data_dir()).expanduser())
  remedy = 'delete that folder and prepare it again'
  with reading(f'The data set {dataset} in {root}', remedy=remedy):
    for info in Path(root, dataset, str(size)).glob(f'*/{METADATA}'):
      check_metadata(info.parent)
    return make(size, root)


def is_prepared(builder: Any) -> bool:
  """Return whether the data set of a builder is complete on disk."""
  return (Path(builder.data_dir) / METADATA).exists()


def prepare_dataset(dataset: str, size: int, data_dir: str | None = None) -> str:
  """Prepare a data set unless that is done already; return its folder.

  An interrupted run leaves a folder of another name, never read. Of two at once the first to finish
  wins. UserError: as `make_builder`; missing packages, or a folder that cannot be written.
  """
  builder = make_builder(dataset, size, data_dir)
  if not is_prepared(builder):
    _generate(builder)
  return str(builder.data_dir)


def _generate(builder: Any) -> None:
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()  # Ours says more in one line.
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config)
  except OSError as error:
    # TFDS renames a finished folder into place, which fails when another process was faster.
    if not is_prepared(builder):
      raise UserError(
        f'Cannot write the data set to {builder.data_dir} ({first_line(error)}): '
        f'choose another folder with --data_dir or ${_ENVIRONMENT}.'
      ) from error


def prepared(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """Return (train, test) of the data set that a `DataConfig` names."""
  without_effect(config, config.dataset, *OF_FOLDERS)
  train, test = (
    open_source(
      config.dataset, split, size=square_of(config), data_dir=config.data_dir or None,
      prepare=config.prepare,
    )
    for split in ('train', 'test')
  )
  return train, test


def open_source(
  dataset: str, split: str, *, size: int, data_dir: str | None = None, prepare: bool = False
) -> PictureSource:
  """Open one split of a prepared data set, 'train', 'test', or a slice such as 'train[:100]'.

  dataset, size, data_dir: as `make_builder`. prepare: prepare the data set if missing. UserError:
  unknown name, size or split, missing or unreadable data.
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
  entries = PreparedEntries(builder.data_dir, split)
  return PictureSource(entries, credit=DATASETS[dataset][-1])


class Prepared(Sequence):
  """One split of a folder with dataset_info.json and ArrayRecord files, by record; it pickles.

  split: a name, a TFDS slice, or '' for an only split. UserError: an unreadable folder, another
  split, or records without images.
  """

  any_image = False
  """Whether pictures may be in a feature of another name than 'image'."""

  def __init__(self, folder: str | Path, split: str = ''):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.folder = Path(folder).absolute()
    check_metadata(self.folder)
    with self._reading():
      builder = tfds.builder_from_directory(str(self.folder))
      splits, features = sorted(builder.info.splits), builder.info.features
      images = [name for name in features if isinstance(features[name], tfds.features.Image)]
    if not (images if self.any_image else 'image' in images):
      raise UserError(
        f"the data set in {folder} has no feature 'image', but {', '.join(features)}."
      )
    if not split and len(splits) > 1:
      raise UserError(f'{folder} has the splits {", ".join(splits)}; give {folder}:{splits[-1]}.')
    with self._reading():
      self.split = split or splits[0]
    try:
      chosen = builder.info.splits[self.split]
    except (KeyError, ValueError) as error:
      raise UserError(
        f'{folder} has no split {split!r}; use one of {", ".join(splits)}, or a slice such as '
        f"'{splits[-1]}[:100]'."
      ) from error
    self._describe(images[0] if self.any_image and 'image' not in images else 'image', features)
    with self._reading():
      check_shards(self.folder, chosen)
      self._records = ArrayRecordDataSource(chosen.file_instructions)
      self._length = len(self._records)

  def _describe(self, image: str, features: Any) -> None:
    """Keep what is needed of the features; image: the name of that of the pictures."""

  def __len__(self) -> int:
    return self._length

  def _where(self, index: int) -> str:
    return f'{index} of {self.split} in {self.folder}'

  def _reading(self, what: str = '') -> contextlib.AbstractContextManager:
    return reading(
      what or f'the data set in {self.folder}', remedy=f'remove {self.folder} and prepare it again'
    )

  def _features(self, index: int) -> Mapping[str, list[bytes]]:
    """The bytes features of a record; no image is decoded."""
    features = self._example(index)
    return {name: list(feature.bytes_list.value) for name, feature in features.items()}

  def _example(self, index: int) -> Mapping[str, Any]:
    from tensorflow_datasets.proto import tf_example_pb2

    with self._reading(f'the record {self._where(index)}'):
      return tf_example_pb2.Example.FromString(self._records[index]).features.feature

  def _image(self, features: Mapping[str, list[bytes]], index: int) -> np.ndarray:
    with self._reading(f'the image {self._where(index)}'):
      (data,) = features['image']
    # Pillow decodes it: TFDS would ask for OpenCV, and damaged images must be named.
    return read_pixels(io.BytesIO(data), self._where(index))


class PreparedImages(Prepared):
  """The feature 'image' of any data set."""

  def __getitem__(self, index: int) -> np.ndarray:
    """Return image `index`, uint8 [h w 3]. UserError, naming it, where it cannot be read."""
    index = range(self._length)[index]
    return self._image(self._features(index), index)


class PreparedEntries(Prepared, Entries):
  """Records of our own data sets: image, captions, id, and label where it has groups."""

  def __getitem__(self, index: int) -> Entry:
    """Entry `index`. Unreadable where it is damaged, or the file that it is in."""
    try:
      features = self._features(index)
      texts = self._texts(features, index)
      with self._reading(f'the record {self._where(index)}'):
        (picture,), (name, *_), captions = features['image'], texts['id'], texts['captions']
        label = texts['group'][0] if 'group' in texts else None
    except UserError as error:
      raise Unreadable(str(error)) from error
    return Entry(name, self._where(index), picture, captions, label=label)

  def _texts(self, features: Mapping[str, list[bytes]], index: int) -> dict[str, list[str]]:
    with self._reading(f'the record {self._where(index)}'):
      return {
        name: [text.decode() for text in features[name]] for name in ('id', 'captions', 'group')
        if name in features
      }

  @property
  def labels(self) -> list[str]:
    """The labels of all records, in order; no image is decoded. UserError where there are none."""
    try:
      return [self._texts(self._features(i), i)['group'][0] for i in range(self._length)]
    except KeyError:
      raise UserError(f'the data set in {self.folder} has no labels: use another.') from None

  def fingerprint(self, numbers: np.ndarray) -> dict[str, str]:
    """Return hashes that change with the texts and pixels of records, not with their storage."""
    some = lambda most: (int(numbers[i]) for i in spread(len(numbers), most))
    return {
      'captions': of_texts([self._all_texts(i) for i in some(RECORDS)]),
      'pictures': of_images([self._pixels(i) for i in some(IMAGES)]),
    }

  def _all_texts(self, index: int) -> list[list[str]] | None:
    """All texts of a record; None of one that cannot be read."""
    try:
      return list(self._texts(self._features(index), index).values())
    except UserError:
      return None

  def _pixels(self, index: int) -> np.ndarray:
    try:
      entry = self[index]
      return read_pixels(entry.source, entry.where)
    except UserError:
      return np.zeros((0, 0, 3), np.uint8)
