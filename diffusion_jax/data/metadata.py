"""Lists of captions: metadata.jsonl, metadata.csv and metadata.tsv, as diffusers' users keep them.

A row has the name of a picture below the list's folder (`file_name`) and its caption (`text`). A
list of texts, several columns of captions and several rows are several captions. Null, numbers and
objects are none.
"""

import csv
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.data.finding import Left, key_of
from diffusion_jax.data.text import LONGEST, clean, stream_lines
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, parse_json

LISTS = ('metadata.jsonl', 'metadata.csv', 'metadata.tsv')
"""Where a folder has several, the first that names a picture has its captions."""
NAMES = ('file_name', 'filename', 'file', 'image', 'image_path', 'file_path', 'path')
"""Columns for the name of the picture; the first that a row has counts."""
CAPTIONS = (
  'text', 'texts', 'caption', 'captions', 'prompt', 'prompts', 'description', 'descriptions',
)
"""Columns for captions, in the order in which they are taken."""
_LONGEST_ROW = 16 * LONGEST


def read_list(path: Path, root: Path, column: str, left: Left) -> dict[str, list[str]]:
  """Key of each picture below `root` that a list names (`finding.key_of`) -> its captions.

  Args:
    column: the only one for captions; '' for all of CAPTIONS.
    left: is told of rows and values that are no captions.

  Raises:
    UserError: the list cannot be read, or names a picture outside of `root`.
  """
  columns = (column.lower(),) if column else CAPTIONS
  found: dict[str, list[str]] = {}
  seen: set[str] = set()
  without: list[str] = []
  try:
    for line, row in _rows(path):
      seen |= row.keys()
      where = f'line {line} of {path.relative_to(root)}'
      name = next((row[c] for c in NAMES if isinstance(row.get(c), str) and clean(row[c])), None)
      if name is None:
        left.add('rows without file_name', where)
        continue
      texts = found.setdefault(_key(clean(name), path, root), [])
      values = [row[c] for c in columns if c in row]
      without += [] if values else [where]
      new = [text for value in values for text in _texts(value, where, left)]
      texts += [text for text in dict.fromkeys(new) if text not in texts]
  except UserError:
    raise
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({first_line(error)}); give each picture a row with file_name and '
      'text.'
    ) from error
  if seen and not seen & {*columns}:
    other = f'{path.relative_to(root)} with {", ".join(sorted(seen))}'
    left.add(f'lists without a column {columns[0]}', other[:200])
  elif without:
    left.add('rows without a caption', without[0], len(without))
  return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """(number of its last line, row) with names of columns in small letters."""
  lines = stream_lines(path, _LONGEST_ROW)
  if path.suffix == '.jsonl':
    yield from _json_rows(lines)
    return
  first = next(lines, '')
  lines = _again(first, lines)
  separator = '\t' if path.suffix == '.tsv' else max(',;\t', key=first.count)
  reader = csv.reader(lines, delimiter=separator, strict=True)
  try:
    header = [clean(name).lower() for name in next(reader, [])]
    for values in reader:
      if len(values) > len(header):
        raise ValueError(
          f'{len(values)} values for {len(header)} columns; put texts with {separator!r} in quotes'
        )
      if any(map(clean, values)):
        yield reader.line_num, dict(zip(header, values, strict=False))
  except (ValueError, csv.Error) as error:
    raise ValueError(f'line {reader.line_num}: {first_line(error)}') from error


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
  for number, line in enumerate(lines, 1):
    if text := clean(line):
      try:
        row = parse_json(text)
      except ValueError as error:
        raise ValueError(f'line {number}: {first_line(error)}') from error
      if not isinstance(row, Mapping):
        raise ValueError(f'line {number}: it is no object, but a {type(row).__name__}')
      yield number, {clean(name).lower(): value for name, value in row.items()}


def _again(first: str, lines: Iterator[str]) -> Iterator[str]:
  yield first
  yield from lines


def _texts(value: Any, where: str, left: Left) -> list[str]:
  """The captions in a value, which may be a list of them."""
  texts = []
  for each in value if isinstance(value, list) else [value]:
    if not isinstance(each, str):
      kind = 'null' if each is None else {dict: 'an object', list: 'a list'}.get(
        type(each), 'a number'
      )
      left.add(f'captions that are {kind}', where)
    elif not clean(each):
      left.add('captions that are empty', where)
    elif len(each) > LONGEST:
      left.add(f'captions of more than {LONGEST:,} characters', where)
    else:
      texts.append(clean(each))
  return texts


def _key(name: str, path: Path, root: Path) -> str:
  """UserError for a name that leads out of `root`."""
  place = name.replace('\\', '/')
  if posixpath.isabs(place):
    place = posixpath.relpath(place, Path(os.path.abspath(root)).as_posix())
  else:
    place = posixpath.join(path.parent.relative_to(root).as_posix(), place)
  place = posixpath.normpath(place)
  if place in ('.', '..') or place.startswith('../') or re.match('[A-Za-z]:/', place):
    raise UserError(
      f'{path} names {name[:200]!r}, which is not in {root}; name pictures of its folder.'
    )
  return key_of(place)
