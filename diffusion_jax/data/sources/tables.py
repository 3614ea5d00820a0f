"""Pictures in tables, 'parquet:PATTERN' and 'arrow:PATTERN', such as Hugging Face's on disk.

The column of pictures holds their bytes, or {bytes, path}; columns of captions are those of
`fields.CAPTIONS`, and a class may be a number with names in the file (ClassLabel). Of Parquet the
page that a picture is in is read, or where that is not understood its row group, of which few are
kept; Arrow is mapped into memory. Rows keep their order.
"""

import abc
import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from diffusion_jax.config import DataConfig
from diffusion_jax.data import storage
from diffusion_jax.data.fields import captions_in, clean, label_in, label_of
from diffusion_jax.data.images import MOST_BYTES
from diffusion_jax.data.kept import Kept
from diffusion_jax.data.parquet_pages import Pages, Unknown, column_of
from diffusion_jax.data.sources.entries import Entry
from diffusion_jax.data.sources.indexed import Indexed, open_splits
from diffusion_jax.data.sources.pictures import PictureSource
from diffusion_jax.data.storage import File
from diffusion_jax.data.tables import Layout, layout_of, name_in, picture_in, pyarrow
from diffusion_jax.errors import Unreadable, UserError
from diffusion_jax.files import first_line, reading

REMEDY = 'write or fetch it again'
KEPT, MOST_KEPT = 8, 2**28
"""Row groups that are kept in memory, and their bytes, of which one may have more."""
STREAMED, ROWS = 2**28, 64
"""Bytes of a row group from which on so many rows of it are read at a time, in order."""


_PAGES, _TEXTS, _FOOTERS = 2**26, 2**26, 2**25
"""Bytes that are kept of unpacked pages, of other columns, and of what files say of their parts."""
_CHUNKS = 4096
"""Row groups whose pages are known."""


def open_parquet(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'parquet:PATTERN'."""
  pyarrow(config.dataset)
  return open_splits(config, ('.parquet',), 'file of Parquet', Parquet)


def open_arrow(config: DataConfig) -> tuple[PictureSource, PictureSource]:
  """(train, test) of 'arrow:DIR', which may have folders of splits."""
  pyarrow(config.dataset)
  if storage.is_remote(config.dataset.partition(':')[2]):
    raise UserError(f'{config.dataset} is mapped into memory, which a URL cannot be; copy it here.')
  return open_splits(config, ('.arrow',), 'file of Arrow', Arrow)


class Tables(Indexed):
  """Rows of tables in blocks; a kind says how many rows each block has, and reads one.

  blocks: int64 [n 3]: of each block the file, its number in the file, and how many rows.
  """

  layout: Layout
  blocks: np.ndarray

  def _start(self) -> None:
    self._ends = np.cumsum(self.blocks[:, 2])
    if not len(self):
      raise UserError(f'there is no row in {self.where}; {REMEDY}.')

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> Entry:
    """Entry `index`. Unreadable."""
    return self._entry(index, True)

  def about(self, index: int) -> Entry:
    """Entry `index`; the column of pictures is not read. Unreadable."""
    return self._entry(index, False)

  def read(self, index: int) -> bytes:
    """The bytes of a picture, whatever is said of it. Unreadable."""
    return self._cells(index, True)[1]

  def _entry(self, index: int, picture: bool) -> Entry:
    values, data, name, where = self._cells(index, picture)
    name = name_in(values, self.layout, name)
    label = label_in({'label': values.get(self.layout.label.lower())}, self.layout.classes)
    return self.entry(name, f'{name} ({where})', data, captions_in(values, self.column), label)

  def _cells(self, index: int, picture: bool) -> tuple[dict[str, Any], bytes, str, str]:
    """(cells of a row by column in small letters, its picture or b'', what it is called if no cell
    says so, where it is). Unreadable."""
    block = int(np.searchsorted(self._ends, index, side='right'))
    row = index - int(self._ends[block - 1] if block else 0)
    file, number, _ = self.blocks[block].tolist()
    path = self.files[file]
    where = f'row {index} ({row} of part {number} in {path.path})'
    try:
      values = self._row(file, number, row, picture)
      values = {clean(name).lower(): value for name, value in values.items()}
      data, name = picture_in(values.get(self.layout.image.lower()))
    except Exception as error:  # Whatever pyarrow makes of damaged files.
      raise Unreadable(
        f'the image of {where} cannot be read ({first_line(error)}); {REMEDY}.',
        'bad text' if 'utf8' in repr(error).lower().replace('-', '') else storage.cause_of(error),
      ) from error
    if not picture:
      data = b''
    if not isinstance(data, bytes):
      raise Unreadable(f'{where} has no picture in it; {REMEDY}.', 'missing')
    if len(data) > MOST_BYTES:
      raise Unreadable(f'the image of {where} has {len(data):,} bytes; give less.', 'too large')
    name = name or f'{path.name.rpartition(".")[0]}-{row + self._before(block):08d}'
    return values, data, name, where

  def _before(self, block: int) -> int:
    """Rows of the same file before a block."""
    number = int(self.blocks[block, 1])
    return int(self.blocks[block - number : block, 2].sum())

  @abc.abstractmethod
  def _row(self, file: int, number: int, row: int, picture: bool) -> dict[str, Any]:
    """The cells of a row of a part of a file, by column, see `Layout.columns`."""

  @abc.abstractmethod
  def _label_values(self) -> Iterator[Any]:
    """The cells of the column of classes."""

  def labels_of_all(self) -> Iterable[str | None]:
    """The label of each, None for none."""
    if not self.layout.label:
      yield from (None for _ in range(len(self)))
      return
    for value in self._label_values():
      yield label_of(value, self.layout.classes) if isinstance(value, int) else (
        clean(value) or None if isinstance(value, str) else None
      )


class Parquet(Tables):
  """Rows of files of Parquet."""

  def __init__(self, files: Sequence[File], config: DataConfig):
    super().__init__(files, config)
    self._reset()
    self.blocks = np.array(self.index.column('blocks', self._groups))
    with reading(files[0].path, remedy=REMEDY), self._opened(0) as file:
      self.layout = layout_of(file.schema_arrow, files[0].path, config.caption_column)
    self._start()

  def _reset(self) -> None:
    self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
    self._told = Kept(_TEXTS, lambda table: table.nbytes + 1024)
    size = lambda values: len(values.data) + 1024 if values else 0
    self._pages, self._dictionaries = Kept(_PAGES, size), Kept(_PAGES, size)
    self._chunks = Kept(_CHUNKS, lambda pages: 1)
    self._metadata = Kept(_FOOTERS, lambda metadata: metadata.serialized_size)
    self._stream: tuple[int, int, int, Any, Any] | None = None
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    own = '_kept', '_stream', '_lock', '_told', '_pages', '_dictionaries', '_chunks', '_metadata'
    return {k: v for k, v in self.__dict__.items() if k not in own}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def _opened(self, file: int) -> Any:
    parquet, path = pyarrow(self.where).parquet, self.files[file].path

    def read() -> Any:
      with storage.opened(path) as source:
        return parquet.read_metadata(source)

    return parquet.ParquetFile(
      storage.opened(path), metadata=self._metadata(file, read), pre_buffer=False
    )

  def _groups(self) -> np.ndarray:
    found = []
    for number, file in enumerate(self.files):
      with reading(file.path, 'is no whole file of Parquet', REMEDY), self._opened(number) as table:
        groups = table.metadata.num_row_groups
        found += [(number, i, table.metadata.row_group(i).num_rows) for i in range(groups)]
    return np.array(found, np.int64).reshape(-1, 3)

  def _row(self, file: int, number: int, row: int, picture: bool) -> dict[str, Any]:
    if picture and (pages := self._chunks((file, number), lambda: self._pages_of(file, number))):
      try:
        return self._row_by_page(file, number, row, pages)
      except (storage.NotRead, FileNotFoundError):
        raise
      except Exception:  # What damage there is pyarrow says.
        pass
    if picture:
      with self._lock:
        table, row = self._table(file, number, row)
    else:
      table = self._told((file, number), lambda: self._read_group(file, number, False))
    return {name: table.column(name)[row].as_py() for name in table.schema.names}

  def _row_by_page(self, file: int, number: int, row: int, pages: Pages) -> dict[str, Any]:
    """The cells of a row, of which the page of the picture is read alone. Unknown."""
    page, place = pages.place(row)
    dictionary = lambda: self._dictionaries((file, number), pages.dictionary)
    values = self._pages((file, number, page), lambda: pages.values(page, dictionary))
    cells = self._row(file, number, row, False)
    known, image = cells.get(self.layout.image), self.layout.image
    data = values[place]
    return cells | {image: {**(known or {}), 'bytes': data} if self.layout.path else data}

  def _pages_of(self, file: int, number: int) -> Pages | None:
    """The pages of a group's pictures; None where they are not understood."""
    path, arrow = self.files[file].path, pyarrow(self.where)

    def unpack(data: bytes, size: int, codec: str) -> bytes:
      return arrow.decompress(data, size, codec.lower(), asbytes=True)

    with self._opened(file) as table, contextlib.suppress(Unknown):
      column, level = column_of(table.schema, (self.layout.image, f'{self.layout.image}.bytes'))
      chunk = table.metadata.row_group(number).column(column)
      return Pages(functools.partial(storage.read, path), unpack, chunk, level)
    return None

  def _read_group(self, file: int, number: int, picture: bool) -> Any:
    with self._opened(file) as table:
      return table.read_row_group(number, self.layout.columns(picture), use_threads=False)

  def _table(self, file: int, number: int, row: int) -> tuple[Any, int]:
    """(rows of a group, the place of `row` in them)."""
    key = file, number
    if key in self._kept:
      self._kept.move_to_end(key)
      return self._kept[key], row
    if self._stream and self._stream[:2] == key and row >= self._stream[2]:
      return self._streamed(file, number, row)
    with self._opened(file) as table:
      if table.metadata.row_group(number).total_byte_size > STREAMED:
        return self._streamed(file, number, row)
    found = self._read_group(file, number, True)
    self._kept[key] = found
    while len(self._kept) > KEPT or (
      len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > MOST_KEPT
    ):
      self._kept.popitem(last=False)
    return found, row

  def _streamed(self, file: int, number: int, row: int) -> tuple[Any, int]:
    """Rows of a group that is too large to keep: forwards from the last that were read."""
    stream = self._stream
    if not stream or stream[:2] != (file, number) or row < stream[2]:
      batches = self._opened(file).iter_batches(
        ROWS, row_groups=[number], columns=self.layout.columns(True), use_threads=False
      )
      stream = (file, number, 0, next(batches), batches)
    _, _, first, batch, batches = stream
    while row >= first + batch.num_rows:
      first, batch = first + batch.num_rows, next(batches)
    self._stream = (file, number, first, batch, batches)
    return batch, row - first

  def _label_values(self) -> Iterator[Any]:
    for file, number, _ in self.blocks.tolist():
      with self._opened(file) as table:
        found = table.read_row_group(number, columns=[self.layout.label])
      yield from found.column(0).to_pylist()


class Arrow(Tables):
  """Rows of files of Arrow, streams or not, mapped into memory."""

  def __init__(self, files: Sequence[File], config: DataConfig):
    # Its own intermediate results lie beside a data set that was mapped or filtered.
    own = [file for file in files if not file.name.startswith('cache-')] or files
    super().__init__(own, config)
    self._map()
    self.blocks = np.array([
      (number, i, batch.num_rows)
      for number, batches in enumerate(self._batches) for i, batch in enumerate(batches)
    ], np.int64).reshape(-1, 3)
    if not len(self.blocks):
      raise UserError(f'there is no row in {self.where}; {REMEDY}.')
    schema = self._batches[int(self.blocks[0, 0])][0].schema
    self.layout = layout_of(schema, self.files[0].path, config.caption_column)
    self._start()

  def _map(self) -> None:
    self._batches = [self._read(file.path) for file in self.files]

  def _read(self, path: str) -> list[Any]:
    arrow = pyarrow(path)
    with reading(path, 'is no whole file of Arrow', REMEDY):
      mapped = arrow.memory_map(path)
      try:
        file = arrow.ipc.open_file(mapped)
        return [file.get_batch(i) for i in range(file.num_record_batches)]
      except arrow.ArrowInvalid:
        mapped.seek(0)
        return list(arrow.ipc.open_stream(mapped))

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_batches'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._map()

  def lengths(self) -> np.ndarray | None:
    """Bytes of each picture; None of tables that are damaged."""
    compute, found = pyarrow(self.where).compute, []
    try:
      for batches in self._batches:
        for batch in batches:
          column = batch.column(self.layout.image)
          column = column.field('bytes') if column.type.num_fields else column
          found.append(compute.fill_null(compute.binary_length(column), 0).to_numpy())
    except Exception:  # Of damaged files, which errors name when they are read.
      return None
    return np.concatenate(found).astype(np.int64)

  def _row(self, file: int, number: int, row: int, picture: bool) -> dict[str, Any]:
    batch, cells = self._batches[file][number], {}
    for name in self.layout.columns(picture):
      if name in batch.schema.names:
        cells[name] = batch.column(name).slice(row, 1)
      else:
        cells[name] = batch.column(self.layout.image).slice(row, 1).field('path')
    for each in cells.values():
      _check_sound(each)
    values = {name: each[0].as_py() for name, each in cells.items()}
    if self.layout.image not in values and self.layout.path:
      values[self.layout.image] = {'path': values.pop(f'{self.layout.image}.path')}
    return values

  def _label_values(self) -> Iterator[Any]:
    for file, batches in zip(self.files, self._batches, strict=True):
      for batch in batches:
        column = batch.column(self.layout.label)
        with reading(file.path, 'is no whole file of Arrow', REMEDY):
          column.validate(full=True)
        yield from column.to_pylist()


def _check_sound(cells: Any) -> None:
  """Raise an error of Arrow where lengths lead out of the file, which would end the process.

  An array checks its own length alone, or all of those below it, whichever rows these belong to.
  """
  cells.validate()
  below = getattr(cells, 'flatten', None)
  if below is None or not cells.type.num_fields:
    cells.validate(full=True)
    return
  for each in found if isinstance(found := below(), list) else [found]:
    _check_sound(each)
