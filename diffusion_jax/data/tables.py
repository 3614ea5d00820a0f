"""Tables with pictures in files of Parquet and Arrow, through pyarrow where it is installed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from diffusion_jax.data.fields import LABELS, NAMES, TAGS, WEIGHTS, clean, columns_of
from diffusion_jax.data.finding import key_of
from diffusion_jax.errors import UserError

IMAGES = (
  'image', 'img', 'picture', 'photo', 'jpg', 'jpeg', 'png', 'webp', 'image_bytes', 'bytes',
)
"""Columns for pictures, in the order in which they are looked for."""
IDS = ('id', 'key', '__key__', 'image_id', *NAMES)
"""Columns for what a record is called."""


def pyarrow(what: str) -> Any:
  """The package; UserError, naming `what` needs it, where it is missing."""
  try:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(
      f"{what} needs the package pyarrow: install it with pip install 'diffusion_jax[data]'."
    ) from error
  return pyarrow


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
  """The rows of a file of Parquet, a batch in memory at a time. ValueError, OSError: damage."""
  with pyarrow(path).parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(1024):
      yield from batch.to_pylist()


class Layout(NamedTuple):
  """Columns of a table of pictures: that of the pictures, those of texts, of the class ('' for
  none; classes: its names, if it has numbers), of the id ('' for none). path: whether the column of
  pictures has a field of that name."""

  image: str
  texts: tuple[str, ...]
  label: str
  classes: tuple[str, ...]
  name: str
  path: bool

  def columns(self, pictures: bool) -> list[str]:
    """Those that are read; pictures: with their bytes, else of their column IMAGE.path at most."""
    image = self.image if pictures else f'{self.image}.path' if self.path else ''
    return list(dict.fromkeys(filter(None, (image, *self.texts, self.label, self.name))))


def layout_of(schema: Any, where: str, column: str = '') -> Layout:
  """The layout of a table by its schema; column: the only one of captions, '' for all known.

  UserError: there are no pictures in it.
  """
  by_name = {clean(name).lower(): name for name in reversed(schema.names)}
  features = _features(schema)
  image = _image_column(schema, by_name, features)
  if not image:
    raise UserError(
      f'{where} has no column of pictures, but {", ".join(schema.names)[:300]}; name one image, '
      'with bytes.'
    )
  first = lambda names: next((by_name[n] for n in names if by_name.get(n, image) != image), '')
  texts = (*columns_of(column), *WEIGHTS, *(() if column else (TAGS,)))
  label = first(LABELS)
  names = features.get(label, {}).get('names')
  return Layout(
    image, tuple(by_name[n] for n in texts if by_name.get(n, image) != image), label,
    tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else (),
    first(IDS), ', path: ' in str(schema.field(image).type),
  )


def _features(schema: Any) -> Mapping[str, Mapping]:
  """What the datasets library says of columns: {'image': {'_type': 'Image'}}."""
  try:
    found = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    return {name: value for name, value in found.items() if isinstance(value, dict)}
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
    return {}


def _image_column(schema: Any, by_name: Mapping[str, str], features: Mapping) -> str:
  named = (name for name in schema.names if features.get(name, {}).get('_type') == 'Image')
  known = (by_name[name] for name in IMAGES if name in by_name)
  types = {name: str(schema.field(name).type) for name in schema.names}
  structs = (name for name, kind in types.items() if kind.startswith('struct<bytes: '))
  candidates = [*named, *known, *structs]
  return next((name for name in candidates if 'binary' in types[name]), '')


def picture_in(value: Any) -> tuple[bytes | None, str]:
  """(bytes, name without suffix) of a picture's cell: bytes, or {'bytes', 'path'}."""
  if isinstance(value, Mapping):
    path, value = value.get('path'), value.get('bytes')
    path = key_of(path) if isinstance(path, str) else ''
    return value, str(PurePosixPath(path).with_suffix('')) if PurePosixPath(path).name else ''
  return value, ''


def name_in(row: Mapping[str, Any], layout: Layout, otherwise: str) -> str:
  """What a row's record is called."""
  value = row.get(layout.name.lower()) if layout.name else None
  if isinstance(value, str) and clean(value):
    return key_of(clean(value))
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return otherwise
