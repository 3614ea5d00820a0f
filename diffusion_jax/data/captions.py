"""Captions from files: a text beside each picture, or lists of captions.

First comes the text file beside a picture (.txt, .caption, .json), then the nearest list
(metadata.jsonl, metadata.csv, metadata.tsv, as for diffusers, or metadata.parquet), then the
caption given for all. A row of a list has the picture's name below the list's folder (`file_name`)
and its caption (`text`); a list of texts, several columns and several rows are several captions.
"""

import codecs
import csv
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.fields import (
  LONGEST,
  NAMES,
  TAGS,
  Caption,
  captions_in,
  clean,
  columns_of,
  filled,
)
from diffusion_jax.data.finding import SUFFIXES, Left, key_of, with_suffixes
from diffusion_jax.data.tables import rows_of
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, parse_json, read_object

MOST_BYTES = 2**26
"""Most bytes of a file that is read whole: a million prompts."""
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'), (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'),
)
_LINE_END = re.compile(r'\r\n|\r|\n')
_OPEN_ALREADY = ('/dev/stdin', '/dev/fd/', '/proc/self/fd/')
"""Where a shell hands over what another command writes."""


def read_lines(path: str | Path, what: str = 'text') -> list[str]:
  """Lines of a file, `what` in errors, as of `lines_of`; UTF-8, or as its byte order mark says.

  UserError: no regular file, no text, more than MOST_BYTES, or a line of more than LONGEST
  characters.
  """
  path = Path(path)
  try:
    if not path.is_file() and path.exists() and not str(path).startswith(_OPEN_ALREADY):
      raise ValueError('it is no regular file')
    with path.open('rb') as file:
      data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
      raise ValueError(f'it has more than {MOST_BYTES:,} bytes')
    text = _checked(data.decode(encoding_of(data)))
  except (OSError, ValueError) as error:
    raise UserError(
      f'the {what} {path} cannot be read ({first_line(error)}); give UTF-8 text.'
    ) from error
  return lines_of(text, path)


def lines_of(text: str, where: str | Path) -> list[str]:
  """The non-blank lines of a text, stripped; only CR, LF and both end a line.

  UserError, naming `where`: a line of more than LONGEST characters, or half a surrogate pair.
  """
  check_characters(text, where)
  lines = [line for part in _LINE_END.split(text) if (line := clean(part))]
  for line in lines:
    if len(line) > LONGEST:
      raise UserError(f'a line of {where} has {len(line):,} characters; write at most {LONGEST:,}.')
  return lines


def check_characters(text: str, where: str | Path) -> None:
  """Raise UserError for halves of characters, which stand for bytes that are not UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where} is not UTF-8 ({first_line(error)}); write it as UTF-8.') from error


def encoding_of(start: bytes) -> str:
  """Return the encoding of a file by its first bytes."""
  return next((name for mark, name in _MARKS if start.startswith(mark)), 'utf-8')


def stream_lines(path: Path, longest: int = LONGEST) -> Iterator[str]:
  """Yield decoded lines with their ends, of files of any size; ValueError: no text, or too long."""
  with path.open('rb') as file:
    encoding = encoding_of(file.read(4))
  with path.open(encoding=encoding, newline='') as lines:
    while line := lines.readline(longest + 1):
      if len(line) > longest:
        raise ValueError(f'a line has more than {longest:,} characters')
      yield _checked(line)


def _checked(text: str) -> str:
  if '\0' in text:
    raise ValueError('it has null characters, as UTF-16 without its mark has, or what is no text')
  return text


LISTS = ('metadata.jsonl', 'metadata.csv', 'metadata.tsv', 'metadata.parquet')
"""Where a folder has several, the first that names a picture has its captions."""
_LONGEST_ROW = 16 * LONGEST


def read_list(path: Path, root: Path, column: str, left: Left) -> dict[str, list[Caption]]:
  """Captions by key (`finding.key_of`) of the pictures below `root` in a list.

  column: the only one for captions; '' for all of CAPTIONS. left: records rows and values that are
  no captions. UserError: the list cannot be read, or names a picture outside of `root`.
  """
  columns, extra = columns_of(column), () if column else (TAGS,)
  found: dict[str, list[Caption]] = {}
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
      without += [] if row.keys() & {*columns, *extra} else [where]
      known = {caption.text for caption in texts}
      new = captions_in(row, column, lambda kind, where=where: left.add(kind, where))
      texts += [caption for caption in new if caption.text not in known]
  except UserError:
    raise
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({first_line(error)}); give each picture a row with file_name and '
      'text.'
    ) from error
  if seen and not seen & {*columns, *extra}:
    other = f'{path.relative_to(root)} with {", ".join(sorted(seen))}'
    left.add(f'lists without a column {columns[0]}', other[:200])
  elif without:
    left.add('rows without a caption', without[0], len(without))
  return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """(number of its last line, row) with names of columns in small letters."""
  if path.suffix.lower() == '.parquet':
    for number, row in enumerate(rows_of(path), 1):
      yield number, {clean(name).lower(): value for name, value in row.items()}
    return
  lines = stream_lines(path, _LONGEST_ROW)
  if path.suffix == '.jsonl':
    yield from _json_rows(lines)
    return
  first = next(lines, '')
  separator = '\t' if path.suffix == '.tsv' else max(',;\t', key=first.count)
  reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
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


TEXTS = ('.txt', '.caption', '.json')
"""Suffixes of files beside pictures, the first that is there counts: one caption a line, or the
fields of a row as a JSON object."""


def captions_of(
  files: Sequence[Path], pictures: Sequence[Path], root: Path, caption: str, column: str,
  left: Left,
) -> list[list[Caption]]:
  """The captions of each of `pictures`, one at least; UserError: one has none, or is unreadable.

  files: all in the folder `root`. caption: for pictures without their own; several, one a line,
  see `fields.filled`. column: of lists; '' for all of `fields.CAPTIONS`. left: records what belongs
  to no picture, and what another source overrides.
  """
  keys = {path: key_of(path.relative_to(root).as_posix()) for path in files}
  listed = _listed(files, root, column, left)
  beside = _beside(files, keys, left)
  every = [keys[path] for path in with_suffixes(files)]
  for name in sorted(listed.keys() - set(every)):
    left.add('rows without a picture', name)
  alone = {beside[stem] for stem in beside.keys() - set(map(_stem, every))}
  for path in sorted(path for path in alone if path.suffix.lower() != '.json'):
    left.add('texts beside no picture', keys[path])
  for path in files:
    known = path.suffix.lower() in (*SUFFIXES, *TEXTS) or path.name.lower() in LISTS
    if not known or (path in alone and path.suffix.lower() == '.json'):
      left.add(f'files of another kind ({path.suffix or "no suffix"})', keys[path])
  lines, found, without = lines_of(caption, 'data.caption'), [], []
  for path in pictures:
    text, rows = beside.get(_stem(keys[path])), listed.get(keys[path], [])
    own = _own_captions(text, column, left) if text else []
    if own and rows:
      left.add('rows of pictures that have a text beside them', keys[path])
    general = [] if own or rows else [Caption(each) for each in filled(lines, _stem(keys[path]))]
    found.append(own or rows or general)
    if not (own or rows):
      without.append((path, bool(general)))
  if bare := [path for path, general in without if not general]:
    raise _no_caption(bare, left)
  if without and len(without) < len(pictures):
    left.add(
      'pictures without a caption of their own, which have data.caption',
      keys[without[0][0]], len(without),
    )
  return found


def _own_captions(path: Path, column: str, left: Left) -> list[Caption]:
  """What the text beside a picture says."""
  if path.suffix.lower() != '.json':
    return [Caption(line) for line in read_lines(path, 'captions')]
  row = {clean(name).lower(): value for name, value in read_object(path).items()}
  captions = captions_in(row, column, lambda kind: left.add(kind, path.name))
  if not captions:
    left.add(f'JSON beside pictures without {columns_of(column)[0]}', path.name)
  return captions


def _listed(files: Sequence[Path], root: Path, column: str, left: Left) -> dict[str, list[Caption]]:
  """Key of a picture -> its captions in the list that is nearest to it."""
  lists = [path for path in files if path.name.lower() in LISTS]
  lists.sort(key=lambda path: (-len(path.parts), LISTS.index(path.name.lower())))
  known: dict[str, list[Caption]] = {}
  for path in lists:
    for key, texts in read_list(path, root, column, left).items():
      if known.get(key) and texts:
        left.add('rows of pictures that another list names first', key)
      known[key] = known.get(key) or texts
  return known


def _beside(files: Sequence[Path], keys: dict[Path, str], left: Left) -> dict[str, Path]:
  """Key of a text without its suffix -> its path."""
  texts = with_suffixes(files, TEXTS)
  texts.sort(key=lambda path: TEXTS.index(path.suffix.lower()))
  found: dict[str, Path] = {}
  for path in texts:
    if found.setdefault(_stem(keys[path]), path) != path:
      left.add('texts beside pictures that have another', keys[path])
  return found


def _stem(key: str) -> str:
  return key.rpartition('.')[0]


def _no_caption(without: Sequence[Path], left: Left) -> UserError:
  first, found = without[0], '; '.join(left.sentences())
  return UserError(
    f'{first} has no caption' + f', nor have {len(without) - 1:,} more' * (len(without) > 1)
    + f' ({found})' * bool(found)
    + f'; write {first.with_suffix(".txt").name} beside it, name it in metadata.jsonl, or set '
    'data.caption.'
  )


class Texts(Sequence[list[Caption]]):
  """Captions of many records in a few arrays, for objects of each would take ten times as much."""

  def __init__(self, captions: Iterable[Sequence[Caption]]):
    texts, counts, weights = [], [], []
    for each in captions:
      counts.append(len(each))
      texts += [caption.text.encode() for caption in each]
      weights += [caption.weight for caption in each]
    self._data = b''.join(texts)
    self._starts = np.cumsum([0, *map(len, texts)])
    self._firsts = np.cumsum([0, *counts])
    alike = len({*weights}) < 2
    self._weights = None if alike else np.asarray(weights, np.float64)

  def __len__(self) -> int:
    return len(self._firsts) - 1

  def __getitem__(self, index: int) -> list[Caption]:
    first, stop = self._firsts[index : index + 2]
    bounds = self._starts[first : stop + 1].tolist()
    texts = (self._data[a:b].decode() for a, b in itertools.pairwise(bounds))
    if self._weights is None:
      return [*map(Caption, texts)]
    return [*map(Caption, texts, self._weights[first:stop].tolist())]
