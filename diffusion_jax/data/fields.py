"""What the fields of a row say of its picture: captions with weights, tags, a class.

Rows are of lists beside pictures, of JSON in archives, and of tables.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from diffusion_jax.data.finding import key_of

LONGEST = 2**16
"""Characters of one text; no text encoder reads a hundredth of it."""
CAPTIONS = (
  'text', 'texts', 'caption', 'captions', 'prompt', 'prompts', 'description', 'descriptions',
)
"""Columns for captions, in the order in which they are taken."""
TAGS = 'tags'
"""The column that is one caption, its texts joined by commas, of pictures without another."""
WEIGHTS = ('caption_weights', 'weights')
LABELS = ('label', 'labels', 'class', 'cls', 'category', 'class_name', 'label_name')
"""Columns for the class, in the order in which they are looked for."""
NAMES = ('file_name', 'filename', 'file', 'image', 'image_path', 'file_path', 'path')
"""Columns for the name of the picture; the first that a row has counts."""
_PLACES = re.compile(r'\{(name|folder|path|label)\}')
BREAKS = re.compile(r'[\W_]+')
"""Between words."""


class Caption(NamedTuple):
  """A text, and how often it is chosen, beside others of its picture."""

  text: str
  weight: float = 1.0


def clean(text: str) -> str:
  """Strip blanks, and byte order marks, which remain where files were put together."""
  return text.strip().strip('\ufeff').strip()


def columns_of(column: str) -> tuple[str, ...]:
  """The columns for captions, in small letters; column: the only one, '' for CAPTIONS."""
  return (column.lower(),) if column else CAPTIONS


def captions_in(
  row: Mapping[str, Any], column: str = '', no: Callable[[str], None] = lambda kind: None
) -> list[Caption]:
  """Captions of a row with names in small letters: texts, lists of them, or of [text, weight].

  Each text once; those of `tags` joined. column: as of `columns_of`. no: called with what each
  other value is.
  """
  weights = next((row[name] for name in WEIGHTS if isinstance(row.get(name), list)), [])
  found: dict[str, Caption] = {}
  for name in columns_of(column):
    values = row.get(name, [])
    values = values if isinstance(values, list) else [values]
    if name == TAGS:
      values = _joined(values)
    given = weights if len(weights) == len(values) else [1.0] * len(values)
    for value, weight in zip(values, given, strict=True):
      if caption := _caption(value, weight, no):
        found.setdefault(caption.text, caption)
  if not found and not column and TAGS in row:
    return captions_in(row, TAGS, no)
  return list(found.values())


def _joined(values: list) -> list:
  tags = [clean(value) for value in values if isinstance(value, str) and clean(value)]
  return [', '.join(tags)] if tags else values


def _caption(value: Any, weight: Any, no: Callable[[str], None]) -> Caption | None:
  if isinstance(value, list) and len(value) == 2 and _is_number(value[1]):
    value, weight = value
  elif isinstance(value, Mapping):
    text = next((value[name] for name in CAPTIONS if isinstance(value.get(name), str)), None)
    value, weight = (value, weight) if text is None else (text, value.get('weight', weight))
  if not isinstance(value, str):
    kind = 'null' if value is None else 'an object' if isinstance(value, Mapping) else (
      'a list' if isinstance(value, list) else 'a number'
    )
    no(f'captions that are {kind}')
  elif not clean(value):
    no('captions that are empty')
  elif len(value) > LONGEST:
    no(f'captions of more than {LONGEST:,} characters')
  elif not (_is_number(weight) and 0 < weight < math.inf):
    no('captions whose weight is no number above 0')
  else:
    return Caption(clean(value), float(weight))
  return None


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def weights_of(captions: Sequence[Caption]) -> tuple[float, ...]:
  """Their weights, or () where all are equally likely."""
  weights = tuple(caption.weight for caption in captions)
  return weights if len({*weights}) > 1 else ()


def label_in(row: Mapping[str, Any], names: Sequence[str] = ()) -> str | None:
  """The class of a row: a text, or a number, which is one of `names` where there are any."""
  for column in LABELS:
    value = row.get(column)
    if isinstance(value, str) and clean(value):
      return clean(value)
    if isinstance(value, int) and not isinstance(value, bool):
      return label_of(value, names)
  return None


def label_of(number: int, names: Sequence[str]) -> str | None:
  """The class of that number, by name where there are names; None of -1, which means none."""
  if not names:
    return None if number < 0 else str(number)
  return names[number] if 0 <= number < len(names) else None


def filled(lines: Sequence[str], name: str, label: str | None = None) -> list[str]:
  """Captions from `data.caption`, where {name}, {folder} and {label} stand for words of a record.

  name: the record's id, such as a path, which {path} is as it stands. Lines with a word that is
  missing are left out.
  """
  if not any(map(_PLACES.search, lines)):
    return list(lines)
  path = PurePosixPath(key_of(name))
  words = {
    'name': words_of(path.name), 'folder': ' '.join(filter(None, map(words_of, path.parts[:-1]))),
    'path': str(path), 'label': '' if label is None else label,
  }
  whole = (line for line in lines if all(words[each] for each in _PLACES.findall(line)))
  return [_PLACES.sub(lambda found: words[found[1]], line) for line in whole]


def words_of(name: str) -> str:
  """'Red_fox-02' -> 'Red fox': the words of a file's name without suffix."""
  return ' '.join(word for word in BREAKS.split(name) if word and not word.isdigit())
