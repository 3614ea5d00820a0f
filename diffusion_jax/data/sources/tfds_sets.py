"""Any data set of pictures that TFDS has prepared as ArrayRecord, 'tfds:NAME[/CONFIG[/VERSION]]'.

Read without TensorFlow, from `data.data_dir`, else from the folders where TFDS and this package
keep theirs. Captions are features named as in `fields.CAPTIONS`; a ClassLabel is the class, and the
caption where there is none, such as by data.caption='a photo of a {label}'.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.config import DataConfig
from diffusion_jax.data.fields import CAPTIONS, LABELS, captions_in, columns_of, label_of
from diffusion_jax.data.finding import TEST, TRAIN
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.indexed import Indexed
from diffusion_jax.data.sources.pictures import PictureSource, train_and_test
from diffusion_jax.data.sources.tfds import METADATA, Prepared, check_metadata, default_data_dir
from diffusion_jax.data.storage import File
from diffusion_jax.data.tables import IDS
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import read_object

_PART = re.compile(r'\w[\w.+-]{0,199}')
_VERSION = re.compile(r'\d+\.\d+\.\d+')


def open_prepared(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'tfds:NAME'; a set without a test split is split by content."""
  folder = folder_of(config.dataset.partition(':')[2], config.data_dir)
  check_metadata(folder)
  names = [split.get('name') for split in read_object(folder / METADATA).get('splits', [])]
  train, test = (next((one for one in known if one in names), '') for known in (TRAIN, TEST))
  chosen = {'train': train, 'test': test} if train and test else {'train': train or names[0]}
  return train_and_test({side: Records(folder, name, config) for side, name in chosen.items()},
                        config)


def folder_of(name: str, data_dir: str = '') -> Path:
  """The newest version of a prepared set, or that folder. UserError: there is none, or several."""
  if Path(name, METADATA).is_file():
    return Path(name)
  parts = name.split('/')
  if not all(_PART.fullmatch(part) and '..' not in part for part in parts):
    raise UserError(f'data.dataset is tfds:{name}; give tfds:NAME, or tfds:NAME/CONFIG.')
  own = [data_dir] if data_dir else [
    default_data_dir(), os.environ.get('TFDS_DATA_DIR', ''), '~/tensorflow_datasets'
  ]
  roots = [Path(each).expanduser() for each in own if each]
  for root in roots:
    folder = root.joinpath(*parts)
    while folder.is_dir():
      if (folder / METADATA).is_file():
        return folder
      inner = [each for each in sorted(folder.iterdir()) if any(each.rglob(METADATA))]
      versions = [each for each in inner if _VERSION.fullmatch(each.name)]
      if not versions and len(inner) != 1:
        break
      folder = max(versions or inner, key=lambda path: [*map(int, re.findall(r'\d+', path.name))])
    else:
      continue
    configs = ', '.join(each.name for each in inner)
    raise UserError(f'tfds:{name} has the configs {configs or "none"}; give tfds:{name}/CONFIG.')
  raise UserError(
    f'the data set {name} is not in {" or ".join(map(str, roots))}; prepare it with TFDS as '
    'ArrayRecord (file_format=array_record), or set data.data_dir.'
  )


class Records(Prepared, Indexed):
  """One split of any prepared set with pictures."""

  any_image = True

  def __init__(self, folder: Path, split: str, config: DataConfig):
    Prepared.__init__(self, folder, split)
    shards = sorted(path for path in self.folder.iterdir() if path.is_file())
    files = [File(str(path), path.stat().st_size, str(path.stat().st_mtime_ns)) for path in shards]
    Indexed.__init__(self, [File(f'{self.folder}:{split}', 0, ''), *files], config)
    self.where = f'{split} of {self.folder}'

  def _describe(self, image: str, features: Any) -> None:
    self.image = image
    names = {name.lower(): name for name in features}
    self.label = next((names[name] for name in LABELS if name in names), '')
    feature = features[self.label] if self.label else None
    self.classes = tuple(getattr(feature, 'names', None) or ())

  def read(self, index: int) -> bytes:
    """The bytes of a picture, whatever is said of it. Unreadable."""
    try:
      example = self._example(index)
      with self._reading(f'the record {self._where(index)}'):
        (picture,) = example[self.image].bytes_list.value
    except UserError as error:
      raise Unreadable(str(error)) from error
    return picture

  def __getitem__(self, index: int) -> Entry:
    """Entry `index`. Unreadable."""
    where = self._where(index)
    try:
      example = self._example(index)
      with self._reading(f'the record {where}'):
        row = self._row(example)
        (picture,) = example[self.image].bytes_list.value
        ids = (_text(example[key]) for key in IDS if key in example and key != self.image)
        name = next(filter(None, ids), f'{self.split}-{index:08d}')
        label = self._label(example)
    except UserError as error:
      raise Unreadable(str(error)) from error
    where = f'{name} ({where})'
    return self.entry(name, where, picture, captions_in(row, self.column), label)

  def _row(self, example: Mapping[str, Any]) -> dict[str, list[str]]:
    """Texts by column; of 'captions/text', too."""
    known, row = {*columns_of(self.column), *CAPTIONS}, {}
    for key, feature in example.items():
      parts = key.lower().split('/')
      column = next((part for part in parts if part in known), '')
      if column and feature.bytes_list.value and key != self.image:
        row.setdefault(column, []).extend(each.decode() for each in feature.bytes_list.value)
    return row

  def _label(self, example: Mapping[str, Any]) -> str | None:
    if not self.label or self.label not in example:
      return None
    feature = example[self.label]
    if numbers := feature.int64_list.value:
      return label_of(numbers[0], self.classes) if len(numbers) == 1 else None
    return _text(feature) or None

  def labels_of_all(self) -> Iterable[str | None]:
    """The label of each, None for none; no picture is decoded."""
    for index in range(len(self)):
      try:
        yield self._label(self._example(index))
      except UserError:
        yield None


def _text(feature: Any) -> str:
  """The only text or whole number of a feature, or ''."""
  values = [*feature.bytes_list.value, *feature.int64_list.value]
  if len(values) != 1:
    return ''
  return values[0].decode() if isinstance(values[0], bytes) else str(values[0])
