"""Pictures in tar files, 'tar:PATTERN', as WebDataset lays them out; nothing is unpacked.

Members that agree up to the first point of their names are one record: a picture, and what is said
of it in KEY.txt or KEY.caption (one caption a line), KEY.json (fields of a row) and KEY.cls (a
class). The headers are read once, and then kept (`index`); records are read by offset, in the order
of their names. Files named or in folders named train and test, or the like, are splits.
"""

import array
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data import storage
from diffusion_jax.data.captions import lines_of
from diffusion_jax.data.fields import Caption, captions_in, clean, label_in
from diffusion_jax.data.finding import SUFFIXES, Left
from diffusion_jax.data.images import MOST_BYTES
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.index import Names
from diffusion_jax.data.sources.indexed import Indexed, open_splits
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.storage import File
from diffusion_jax.data.tars import TAIL, Member, members
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import first_line, parse_json

TEXTS = {'txt': 1, 'caption': 1, 'json': 2, 'cls': 3}
"""Suffix of a member -> its column."""
MOST_TEXT = 2**24
_COLUMNS = 4
_ODD = re.compile(r'^/|//|(?:^|/)\.(?:/|$)|/$')
"""Paths that are written in other ways, too."""
_NAMES = ('name_data', 'name_ends')


def open_tars(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'tar:PATTERN'."""
  return open_splits(config, ('.tar',), 'tar file', Tars)


class Tars(Indexed):
  """Records of tar files."""

  def __init__(self, files: Sequence[File], config: DataConfig):
    super().__init__(files, config)
    self._map()
    if not len(self):
      raise UserError(f'there is no picture in {self.where}; pack some.')

  def __getstate__(self) -> dict:
    """Without columns that are mapped: a copy of each would be sent instead."""
    return {k: v for k, v in self.__dict__.items() if k not in ('_columns', '_names')}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._map()

  def _map(self) -> None:
    self._columns = self.index.columns(('files', 'places', 'left', *_NAMES), self._scan)
    self._names = Names(*(self._columns[name] for name in _NAMES))
    self.left = Left.of(json.loads(self._columns['left'].tobytes()))

  def lengths(self) -> np.ndarray:
    """Bytes of each picture."""
    return self._columns['places'][:, 0, 1]

  def __len__(self) -> int:
    return len(self._columns['files'])

  def name(self, index: int) -> str:
    """The key: the member's path up to the first point of its name."""
    return _key(self._names[index])[0]

  def read(self, index: int) -> bytes:
    """The picture's bytes. Unreadable."""
    return self._bytes(index, 0, MOST_BYTES)

  def __getitem__(self, index: int) -> Entry:
    """Entry `index`. Unreadable."""
    return self._entry(index, self.read(index))

  def about(self, index: int) -> Entry:
    """Entry `index` of which only the texts are read. Unreadable."""
    self._spot(index, 0, MOST_BYTES)
    return self._entry(index, b'')

  def _entry(self, index: int, picture: bytes) -> Entry:
    captions, label = self._told(index)
    return self.entry(self.name(index), self._place(index), picture, captions, label)

  def _place(self, index: int) -> str:
    return f'{self._names[index]} in {self.files[self._columns["files"][index]].path}'

  def _spot(self, index: int, column: int, most: int) -> tuple[int, int]:
    """(offset, size) of a member of a record. Unreadable: there is none, or it is larger."""
    start, size = self._columns['places'][index, column].tolist()
    if start == TAIL:
      raise Unreadable(
        f'the record {self._place(index)} has no picture, or cannot be read; pack it again.',
        'missing',
      )
    if size > most:
      raise Unreadable(
        f'a member of {self._place(index)} has {size:,} bytes; give {most:,}.', 'too large'
      )
    return start, size

  def _bytes(self, index: int, column: int, most: int) -> bytes:
    start, size = self._spot(index, column, most)
    path = self.files[self._columns['files'][index]].path
    try:
      data = storage.read(path, start, size)
    except Exception as error:  # Whatever storage raises.
      raise Unreadable(
        f'the image {self._place(index)} cannot be read ({first_line(error)}); fetch the file '
        'again.',
        'not readable',
      ) from error
    if len(data) < size:
      raise Unreadable(
        f'the image {self._place(index)} is cut; fetch the file again.', 'truncated'
      )
    return data

  def _told(self, index: int) -> tuple[list[Caption], str | None]:
    """(captions, label) of the members beside a picture."""
    found = self._columns['places'][index, 1:, 0] != TAIL
    captions, label = [], None
    try:
      if found[0]:
        lines = lines_of(self._text(index, 1), self._place(index))
        captions = [*map(Caption, lines)]
      if found[1]:
        row = parse_json(self._text(index, 2))
        if not isinstance(row, dict):
          raise ValueError('its JSON is no object')
        row = {clean(name).lower(): value for name, value in row.items()}
        captions, label = captions or captions_in(row, self.column), label_in(row)
      if found[2]:
        label = clean(self._text(index, 3)) or label
    except Unreadable:
      raise
    except (UserError, ValueError) as error:
      raise Unreadable(
        f'the text beside {self._place(index)} cannot be read ({first_line(error)}); write it as '
        'UTF-8.', 'bad text'
      ) from error
    return captions, label

  def _text(self, index: int, column: int) -> str:
    return self._bytes(index, column, MOST_TEXT).decode()

  def labels_of_all(self) -> Iterable[str | None]:
    """The label of each, None for none; only members that may have one are read."""
    for index, may in enumerate((self._columns['places'][:, 2:, 0] != TAIL).any(axis=1)):
      try:
        yield self._told(index)[1] if may else None
      except Unreadable:
        yield None

  def _scan(self) -> dict[str, np.ndarray]:
    """Read the headers of all files."""
    files, places, names, left = array.array('i'), array.array('q'), [], Left()
    for number, file in enumerate(self.files):
      for name, spots in _records(file.path, left):
        files.append(number)
        places.extend(spots)
        names.append(name)
    order = sorted(range(len(names)), key=lambda i: names[i].split('/'))
    return {
      'files': np.frombuffer(files, np.int32)[order] if names else np.zeros(0, np.int32),
      'places': np.array(places, np.int64).reshape(-1, _COLUMNS, 2)[order],
      'left': np.frombuffer(json.dumps(left.found).encode(), np.uint8),
      **dict(zip(_NAMES, Names.columns([names[i] for i in order]), strict=True)),
    }


def _records(path: str, left: Left) -> Iterable[tuple[str, list[int]]]:
  """(name of the picture, (offset, size) of each column in turn) of each record of a file."""
  found: dict[str, list] = {}  # Name and spots.
  for member in members(path, left, (*SUFFIXES, *(f'.{each}' for each in TEXTS))):
    if member.offset == TAIL:
      found[f'\0{member.name}'] = [f'{member.name} ({member.damage})', [TAIL, 0] * _COLUMNS]
      continue
    key, kind = _key(member.name)
    record = found.get(key)
    if record is None:
      record = found[key] = [f'{key}.none', [TAIL, 0] * _COLUMNS]
    column = TEXTS.get(kind.rpartition('.')[2], 0)
    if record[1][2 * column] != TAIL:
      left.add('members of records that have one already', member.name)
      continue
    record[1][2 * column : 2 * column + 2] = _place_of(member)
    if not column:
      record[0] = member.name
  yield from map(tuple, found.values())


def _place_of(member: Member) -> tuple[int, int]:
  return (TAIL, 0) if member.damage else (member.offset, member.size)


def _key(name: str) -> tuple[str, str]:
  """('a/b', 'seg.png') of 'a/b.seg.png'."""
  if _ODD.search(name):
    path = PurePosixPath(name)
    last, parent = path.name, '' if path.parent == PurePosixPath('.') else f'{path.parent}/'
  else:
    parent, bar, last = name.rpartition('/')
    parent += bar
  stem, _, kind = last.partition('.')
  return f'{parent}{stem}', kind.lower()
