"""Single values of a column of bytes in a Parquet file, for pyarrow reads whole row groups.

A column's part of a row group is a row of pages, of some values each; their headers say where they
are (parquet-format, PageHeader in Thrift's compact protocol). One page is read and unpacked for a
value, plain or by dictionary; what else there may be is `Unknown`, and left to pyarrow.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_CODECS = ('SNAPPY', 'GZIP', 'BROTLI', 'ZSTD')
_MOST_HEADER = 2**16
MOST_PAGE, MOST_VALUES = 2**30, 2**24
"""Bytes and values of a page beyond which pyarrow has its say."""


class Unknown(ValueError):
  """Nothing that is understood here."""


class _Page(NamedTuple):
  """Where the body of a page is, and its header's fields by number."""

  offset: int
  size: int
  unpacked: int
  kind: int
  fields: dict[int, Any]


class Values(NamedTuple):
  """Values of a page: of value i the bytes from starts[i] to ends[i]; starts[i] < 0 for none."""

  data: bytes
  starts: np.ndarray
  ends: np.ndarray

  def __getitem__(self, index: int) -> bytes | None:
    start = int(self.starts[index])
    return None if start < 0 else self.data[start : int(self.ends[index])]


class Pages:
  """The pages of one column in one row group.

  read: gives so many bytes from an offset. unpack: of (data, bytes unpacked, codec). chunk: what
  pyarrow's metadata say of it. level: the definition level of a value that is there. Unknown.
  """

  def __init__(
    self, read: Callable[[int, int], bytes], unpack: Callable[[bytes, int, str], bytes],
    chunk: Any, level: int,
  ):
    if chunk.physical_type != 'BYTE_ARRAY' or chunk.compression not in ('UNCOMPRESSED', *_CODECS):
      raise Unknown(f'{chunk.physical_type} by {chunk.compression}')
    self._read, self._unpack, self._codec, self._level = read, unpack, chunk.compression, level
    place = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    stop, found = place + chunk.total_compressed_size, []
    while place < stop:
      found.append(self._header(place, stop))
      place = found[-1].offset + found[-1].size
    first = found and found[0].kind == _DICTIONARY
    self._dictionary, self._pages = (found[0], found[1:]) if first else (None, found)
    if any(page.kind not in (_DATA, _DATA_2) for page in self._pages):
      raise Unknown('pages of another kind')
    self._ends = np.cumsum([page.fields[1] for page in self._pages], dtype=np.int64)
    if not len(self._ends) or self._ends[-1] != chunk.num_values:
      raise Unknown(f'pages of other than {chunk.num_values} values')

  def place(self, row: int) -> tuple[int, int]:
    """(page, number of the value in it) of a row."""
    page = int(np.searchsorted(self._ends, row, side='right'))
    return page, row - int(self._ends[page - 1] if page else 0)

  def _header(self, place: int, stop: int) -> _Page:
    data = self._read(place, min(_MOST_HEADER, stop - place))
    try:
      fields, length = _struct(data, 0)
      kind, unpacked, size = fields[1], fields[2], fields[3]
      own = fields[{_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}[kind]]
    except (IndexError, KeyError, struct.error, RecursionError) as error:
      raise Unknown('a header of a page') from error
    offset = place + length
    sound = 0 <= size <= stop - offset and 0 <= unpacked <= MOST_PAGE
    if not sound or not 0 <= own.get(1, -1) <= MOST_VALUES:
      raise Unknown('a page of impossible size')
    return _Page(offset, size, unpacked, kind, own)

  def dictionary(self) -> Values | None:
    """The values that pages have numbers of; None without."""
    if self._dictionary is None:
      return None
    count = self._dictionary.fields[1]
    return _plain(self._body(self._dictionary, 0), count, np.ones(count, bool))

  def values(self, number: int, dictionary: Callable[[], Values | None]) -> Values:
    """The values of a page; dictionary: gives what `dictionary` has given."""
    page = self._pages[number]
    count, levels = page.fields[1], b''
    if page.kind == _DATA_2:
      own, length = page.fields, page.fields.get(5, 0)
      if own.get(6):
        raise Unknown('repeated values')
      if not 0 <= length <= page.size:
        raise Unknown('levels that are longer than their page')
      levels = self._read(page.offset, length) if length else b''
      encoding, data = own[4], self._body(page, length, own.get(7, True))
    else:
      encoding, data = page.fields[2], self._body(page, 0)
      if self._level:
        (length,) = struct.unpack_from('<I', data)
        levels, data = data[4 : 4 + length], data[4 + length :]
    there = np.ones(count, bool)
    if self._level:
      there = _numbers(levels, self._level.bit_length(), count) == self._level
    if encoding == _PLAIN:
      return _plain(data, count, there)
    known = dictionary()
    if encoding not in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) or known is None:
      raise Unknown(f'values of encoding {encoding}')
    some = int(there.sum())
    chosen = _numbers(data[1:], data[0], some) if some else np.zeros(0, np.int64)
    starts, ends = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    starts[there], ends[there] = known.starts[chosen], known.ends[chosen]
    return Values(known.data, starts, ends)

  def _body(self, page: _Page, skipped: int, packed: bool = True) -> bytes:
    """The bytes of a page after those that are never packed."""
    data = self._read(page.offset + skipped, page.size - skipped)
    if self._codec == 'UNCOMPRESSED' or not packed:
      return data
    return self._unpack(data, page.unpacked - skipped, self._codec) if data else b''


def _plain(data: bytes, count: int, there: np.ndarray) -> Values:
  """Values one after the other, each after its length."""
  starts, ends, place = np.full(count, -1, np.int64), np.zeros(count, np.int64), 0
  for i in np.flatnonzero(there).tolist():
    (length,) = struct.unpack_from('<I', data, place)
    starts[i], ends[i] = place + 4, place + 4 + length
    place += 4 + length
    if place > len(data):
      raise Unknown('a value that is longer than its page')
  return Values(data, starts, ends)


def _numbers(data: bytes, width: int, count: int) -> np.ndarray:
  """Numbers of so many bits in runs and in packs of eight, int64 [count]."""
  parts, found, place, size = [np.zeros(0, np.int64)], 0, 0, -(-width // 8)
  while found < count:
    head, place = _varint(data, place)
    if head & 1:
      packed = np.frombuffer(data[place : place + (head >> 1) * width], np.uint8)
      bits = np.unpackbits(packed, bitorder='little')
      bits = bits[: len(bits) // width * width].reshape(-1, width) if width else bits
      values = bits.astype(np.int64) @ (1 << np.arange(width)) if width else (
        np.zeros(min((head >> 1) * 8, count), np.int64)
      )
      place += (head >> 1) * width
    else:
      value = int.from_bytes(data[place : place + size], 'little')
      values = np.full(min(head >> 1, count), value, np.int64)
      place += size
    if not len(values):
      raise Unknown('numbers that end too early')
    parts.append(values)
    found += len(values)
  return np.concatenate(parts)[:count]


def _varint(data: bytes, place: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[place]
    value |= (byte & 127) << shift
    place, shift = place + 1, shift + 7
    if byte < 128:
      return value, place
    if shift > 63:
      raise Unknown('a number of more than 64 bits')


def _struct(data: bytes, place: int) -> tuple[dict[int, Any], int]:
  """(fields by number, where it ends) of a struct of Thrift's compact protocol."""
  fields: dict[int, Any] = {}
  number = 0
  while (head := data[place]) != 0:
    place += 1
    if head >> 4:
      number += head >> 4
    else:
      number, place = _signed(data, place)
    fields[number], place = _value(data, place, head & 15)
  return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
  if kind in (1, 2):
    return kind == 1, place
  if kind == 3:
    return data[place], place + 1
  if kind in (4, 5, 6):
    return _signed(data, place)
  if kind == 8:
    length, place = _varint(data, place)
    return data[place : place + length], place + length
  if kind == 12:
    return _struct(data, place)
  raise Unknown(f'a field of kind {kind}')


def _signed(data: bytes, place: int) -> tuple[int, int]:
  value, place = _varint(data, place)
  return (value >> 1) ^ -(value & 1), place


def column_of(schema: Any, paths: Sequence[str]) -> tuple[int, int]:
  """(number, definition level) of the first column of these paths. Unknown: none, or repeated."""
  columns = {schema.column(i).path: i for i in range(len(schema))}
  for path in paths:
    if path in columns and not schema.column(columns[path]).max_repetition_level:
      return columns[path], schema.column(columns[path]).max_definition_level
  raise Unknown(f'no column {" or ".join(paths)}')
