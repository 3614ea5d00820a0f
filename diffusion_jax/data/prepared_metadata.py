"""What may stand in the metadata of a prepared data set that others have made.

TFDS imports the module of any class of features that `features.json` or `dataset_info.json` names,
and puts names from them together to paths. Both are read and checked here before TFDS sees them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.files import bounded_bytes, read_object, reading

METADATA, FEATURES = 'dataset_info.json', 'features.json'
MOST_SHARDS = 100_000
REMEDY = 'prepare the data set again'
_SHIPPED = 'tensorflow_datasets.core.features.'
_NAME = re.compile(r'\w[\w.+-]{0,199}')
_MODULE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,50}', re.ASCII)
_PLACEHOLDER = re.compile(r'\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}')
_TEMPLATE = re.compile(r'[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*')


def check_metadata(folder: str | Path) -> None:
  """Reads all metadata of a prepared data set and refuses what could do harm.

  Raises:
    UserError: a file is missing or damaged, or names a class that TFDS does not ship, a path out of
      the folder, another format than ArrayRecord or an impossible number of records.
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
  """Makes sure that the files of one split can hold the records that its metadata promises.

  Args:
    split: a split of TFDS, whole or a part of one.

  Raises:
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
    names = _plain(key) in ('pythonclassname', 'type') and not isinstance(value, dict)
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


def _check_info(path: Path, info: dict[str, Any]) -> None:
  """Names, formats and numbers of dataset_info.json."""
  def check(good: Any, what: str) -> None:
    if not good:
      raise UserError(f'{path} has {what}; prepare the data set again.')

  values = {_plain(key): value for key, value in info.items()}
  check(len(values) == len(info), 'one key in two spellings')
  for key in ('name', 'configname'):
    name = values.get(key, '')
    check(name == '' or _is_name(name), f'the name {str(name)[:200]!r}, which is no plain one')
  module = values.get('modulename', '')
  check(
    isinstance(module, str) and (not module or _MODULE.fullmatch(module)),
    f'the module {str(module)[:200]!r}, which is none',
  )
  formats = [values.get('fileformat', ''), *values.get('alternativefileformats', ())]
  check(
    'array_record' in formats and {*formats} <= {'array_record', 'tfrecord'},
    f'the format {", ".join(map(str, formats))[:200]!r}, where ArrayRecord alone is read',
  )
  check(values.get('splits'), 'no splits')
  count = 0
  for split in values['splits']:
    split = {_plain(key): value for key, value in split.items()}
    check(_is_name(split.get('name')), f'a split named {str(split.get("name"))[:200]!r}')
    template = split.get('filepathtemplate', '')
    check(
      isinstance(template, str) and (not template or _is_template(template)),
      f'the file name {str(template)[:200]!r}, which is not one of a file within the folder',
    )
    lengths = [int(length) for length in split.get('shardlengths', [])]
    check(all(length >= 0 for length in lengths), 'a negative number of records')
    count += len(lengths)
  check(count <= MOST_SHARDS, f'{count:,} files of records, where {MOST_SHARDS:,} are allowed')


def _is_name(name: Any) -> bool:
  return isinstance(name, str) and bool(_NAME.fullmatch(name)) and '..' not in name


def _is_template(template: str) -> bool:
  """Whether it is a relative path with TFDS's own placeholders and none of Python's formats."""
  filled = _PLACEHOLDER.sub('X', template)
  return bool(_TEMPLATE.fullmatch(filled)) and '..' not in filled


def _plain(key: str) -> str:
  return key.replace('_', '').lower()


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
