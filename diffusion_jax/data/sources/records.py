"""Pictures in sharded ArrayRecord of our own, 'records:DIR', which `prepare` writes.

    DIR/records.json                       splits, their shards, names of classes
    DIR/train-00000-of-00008.array_record  records: a header's length (uint32, little-endian), the
                                           header (JSON: id, captions, label), the picture as it was
    DIR/train-00000-of-00008.npy           of each record, ROW: what is known without reading it

Sizes, labels and hashes are read from the rows, mapped into memory, so that a start takes as long
for a million records as for a thousand.
"""

import io
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data import storage
from diffusion_jax.data.fields import Caption, captions_in, clean
from diffusion_jax.data.images import MOST_BYTES
from diffusion_jax.data.sources.entries import DIGEST, Classes, Described, Entry
from diffusion_jax.data.sources.index import Index
from diffusion_jax.data.sources.pictures import PictureSource, train_and_test
from diffusion_jax.data.splits import APART, Measured, content_hash
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import (
  atomic_write,
  first_line,
  parse_json,
  read_object,
  reading,
)

HEADER, FORMAT, VERSION = 'records.json', 'diffusion_jax.records', 1
ROW = np.dtype([('size', '<i4', (2,)), ('label', '<i4'), ('hash', 'u1', (DIGEST,))])
"""(height, width) of the upright picture, 0 0 if unknown; place among the classes, -1 for none;
`splits.content_hash`."""
SUFFIX = '.array_record'
MOST_SHARDS, MOST_TEXTS = 100_000, 2**24
_NAME = re.compile(r'\w[\w.+-]{0,199}')
_LENGTH = 4
_REMEDY = 'prepare it again'
_OPTIONS = 'group_size:1,uncompressed'  # One record is read at a time, and pictures are compressed.


class Shard(NamedTuple):
  """The name of a file of records, and how many there are in it."""

  file: str
  records: int


def open_records(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'records:DIR'; a set without a test split is split by content."""
  place = config.dataset.partition(':')[2]
  folder = cached(place, config) if storage.is_remote(place) else Path(place)
  header = read_header(folder)
  if 'train' not in header['splits']:
    raise UserError(f'{folder / HEADER} has no split train; {_REMEDY}.')
  parts = {
    name: Records(folder, name, shards, header['classes'], config, place)
    for name, shards in header['splits'].items() if name in ('train', 'test')
  }
  measured = Measured(*header['measured']) if header['measured'] else APART
  return train_and_test(parts, config, credit=header['credit'], measured=measured)


def cached(url: str, config: DataConfig) -> Path:
  """A local folder for copies of remote files of records, by their URL and header, with that."""
  (header,) = storage.find(f'{url}/{HEADER}', (HEADER,), 'folder of records')
  folder = Index('copies', (header,), config).folder
  storage.copied(header.path, folder)
  return folder


def read_header(folder: Path) -> dict[str, Any]:
  """{'splits': {name: [Shard]}, 'classes', 'credit', 'measured'} of a folder of records.

  UserError: no such folder, another format, or anything that could lead out of it.
  """
  path = folder / HEADER
  if not path.is_file():
    raise UserError(f'there are no records in {folder} (no {HEADER}); give a folder of prepare.')
  found = read_object(path, remedy=_REMEDY)
  with reading(path, remedy=_REMEDY):
    if found.get('format') != FORMAT or found.get('version') != VERSION:
      raise ValueError(f'it is not of {FORMAT} {VERSION}')
    splits = {
      name: [Shard(_plain(one['file']), _count(one['records'])) for one in shards]
      for name, shards in found['splits'].items()
    }
    if sum(map(len, splits.values())) > MOST_SHARDS:
      raise ValueError(f'it names more than {MOST_SHARDS:,} shards')
    texts = [*found.get('classes', []), found.get('credit', '')]
    if not all(isinstance(text, str) for text in texts):
      raise ValueError('a name is no text')
    said = found.get('measured')
    if said and not (isinstance(said, list) and [*map(type, said)] == [str, bool]):
      raise ValueError('what it is measured on is no sentence')
  return {
    'splits': splits, 'classes': found.get('classes', []), 'credit': found.get('credit', ''),
    'measured': said,
  }


def write_header(
  folder: Path, splits: Mapping[str, Sequence[Shard]], classes: Sequence[str] = (),
  credit: str = '', measured: Measured | None = None,
) -> None:
  """Write what makes a folder of whole shards readable; last of all."""
  values = {
    'format': FORMAT, 'version': VERSION, 'classes': list(classes), 'credit': credit,
    'measured': measured and list(measured),
    'splits': {name: [one._asdict() for one in shards] for name, shards in splits.items()},
  }
  with atomic_write(folder / HEADER, flushed=True) as file:
    file.write(json.dumps(values, indent=1).encode())


def shard_name(split: str, number: int, count: int) -> str:
  """'train-00000-of-00008.array_record'."""
  return f'{split}-{number:05d}-of-{count:05d}{SUFFIX}'


def _plain(name: Any) -> str:
  if not (isinstance(name, str) and _NAME.fullmatch(name) and '..' not in name):
    raise ValueError(f'the file {str(name)[:100]!r} is not in it')
  return name


def _count(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise ValueError(f'{str(value)[:40]} is no number of records')
  return value


class Records(Described):
  """One split of a folder of records. UserError: a file is missing, or its size cannot be."""

  def __init__(
    self, folder: Path, split: str, shards: Sequence[Shard], classes: Sequence[str],
    config: DataConfig, place: str = '',
  ):
    super().__init__(config)
    self.folder, self.classes, self.where = folder.absolute(), list(classes), f'{split} of {folder}'
    self._url = place if storage.is_remote(place) else ''
    self.shards = [one for one in shards if one.records]
    if not self.shards:
      raise UserError(f'{folder / HEADER} has no records of {split}; {_REMEDY}.')
    self._ends = np.cumsum([one.records for one in self.shards])
    for one in self.shards:
      self._copied(one.file.removesuffix(SUFFIX) + '.npy')
      self._check(one)
    self._readers: dict[int, Any] = {}

  def _copied(self, file: str) -> str:
    """The path of a file of this folder; of a remote one it is copied the first time."""
    if self._url:
      storage.copied(f'{self._url}/{file}', self.folder)
    return str(self.folder / file)

  def _check(self, shard: Shard) -> None:
    path = self.folder / shard.file
    with reading(path, remedy=_REMEDY):
      for each in (path, path.with_suffix('.npy')):
        if each.is_symlink() and not each.resolve().is_relative_to(self.folder.resolve()):
          raise ValueError('it is a link out of the folder')
      _rows(path, shard.records)
      if self._url:
        return
      if not path.is_file():
        raise ValueError('it is missing')
      if (size := path.stat().st_size) < shard.records * _LENGTH:
        raise ValueError(f'it has {size:,} bytes for {shard.records:,} records')

  def _read(self, index: int) -> bytes:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    shard, place = self._spot(index)
    if shard not in self._readers:  # Two threads may open it at once, which does no harm.
      one = self.shards[shard]
      whole = _Instruction(self._copied(one.file), 0, one.records, one.records)
      self._readers[shard] = ArrayRecordDataSource([whole])
    return self._readers[shard][place]

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_readers': {}}

  def __len__(self) -> int:
    return int(self._ends[-1])

  def _column(self, name: str) -> np.ndarray:
    rows = [_rows(self.folder / one.file, one.records) for one in self.shards]
    return np.concatenate([each[name] for each in rows])

  @property
  def sizes(self) -> np.ndarray | None:
    """As kept; None where a shard was written without any."""
    sizes = self._column('size')
    return sizes if sizes.any() else None

  @property
  def digests(self) -> np.ndarray:
    """As kept."""
    return self._column('hash')

  @property
  def labels(self) -> Classes | None:
    """As kept; None without classes."""
    return Classes(self._column('label'), self.classes) if self.classes else None

  def __getitem__(self, index: int) -> Entry:
    """Entry `index`. Unreadable where it is damaged, or has no caption."""
    where = self._where(index)
    try:
      fields, picture = unpack(self._read(index))
      row = {clean(name).lower(): value for name, value in fields.items()}
      name, label = row.get('id'), row.get('label')
      if not isinstance(name, str) or not isinstance(label, (str, type(None))):
        raise ValueError('its header has no id')
    except Exception as error:  # The reader raises what it will of damaged files.
      raise Unreadable(
        f'the record {where} cannot be read ({first_line(error)}); {_REMEDY}.',
        storage.cause_of(error),
      ) from error
    return self.entry(name, f'{name} ({where})', picture, captions_in(row, self.column), label)

  def _spot(self, index: int) -> tuple[int, int]:
    """(shard, number in it) of a record."""
    shard = int(np.searchsorted(self._ends, index, side='right'))
    return shard, index - int(self._ends[shard - 1] if shard else 0)

  def _where(self, index: int) -> str:
    shard, place = self._spot(index)
    return f'{place} of {self.shards[shard].file} in {self._url or self.folder}'


class _Instruction(NamedTuple):
  """What ArrayRecord's reader takes for part of a file, without opening the file."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def _rows(path: Path, records: int) -> np.ndarray:
  """The rows of a shard, mapped; ValueError: others than it should have."""
  rows = np.load(path.with_suffix('.npy'), mmap_mode='r', allow_pickle=False)
  if rows.dtype != ROW or rows.shape != (records,):
    raise ValueError(f'{path.stem}.npy is not of its {records:,} records')
  return rows


def pack(name: str, captions: Sequence[Caption], label: str | None, picture: bytes) -> bytes:
  """One record's bytes."""
  fields: dict[str, Any] = {
    'id': name, 'captions': [c.text if c.weight == 1 else [c.text, c.weight] for c in captions],
  }
  header = json.dumps(fields | ({} if label is None else {'label': label}), ensure_ascii=False)
  data = header.encode()
  return len(data).to_bytes(_LENGTH, 'little') + data + picture


def unpack(record: bytes) -> tuple[dict[str, Any], bytes]:
  """(fields, picture) of a record's bytes; ValueError for others."""
  length = int.from_bytes(record[:_LENGTH], 'little')
  if len(record) < _LENGTH + length or length > MOST_TEXTS or len(record) > MOST_BYTES + MOST_TEXTS:
    raise ValueError(f'{len(record):,} bytes with a header of {length:,}')
  fields = parse_json(record[_LENGTH : _LENGTH + length])
  if not isinstance(fields, dict):
    raise ValueError('its header is no JSON object')
  return fields, record[_LENGTH + length :]


class ShardWriter:
  """Writes one shard, which is there only when it is closed without an error.

  path: as of `shard_name`. classes: names of labels.
  """

  def __init__(self, path: Path, classes: Sequence[str] = ()):
    from array_record.python.array_record_module import ArrayRecordWriter

    self.path, self._rows = path, []
    self._classes = {name: number for number, name in enumerate(classes)}
    self._temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
    path.parent.mkdir(parents=True, exist_ok=True)
    self._writer = ArrayRecordWriter(str(self._temporary), _OPTIONS)

  def add(self, entry: Entry, size: tuple[int, int] = (0, 0)) -> None:
    """Add an entry; size: (height, width) of the upright picture. OSError: its file is gone."""
    weights = entry.weights or [1.0] * len(entry.captions or ())
    captions = [*map(Caption, entry.captions or (), weights)]
    picture = entry.data()
    digest = content_hash(io.BytesIO(picture))[:DIGEST]
    self._writer.write(pack(entry.name, captions, entry.label, picture))
    self._rows.append((size, self._classes.get(entry.label, -1), list(digest)))

  def __enter__(self) -> 'ShardWriter':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    try:
      self._writer.close()
      if kind is None:
        with atomic_write(self.path.with_suffix('.npy'), flushed=True) as file:
          np.save(file, np.array(self._rows, ROW))
        os.replace(self._temporary, self.path)
    finally:
      self._temporary.unlink(missing_ok=True)

  def __len__(self) -> int:
    return len(self._rows)


def whole_shard(path: Path) -> Shard | None:
  """A shard that has been written to its end; None without."""
  try:
    rows = np.load(path.with_suffix('.npy'), mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError):
    return None
  return Shard(path.name, len(rows)) if path.is_file() and rows.dtype == ROW else None
