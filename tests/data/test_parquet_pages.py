"""Values by page are those of pyarrow, whatever wrote the file; damage ends in an error."""

import functools
import itertools
import time

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest

from diffusion_jax.data import storage
from diffusion_jax.data.parquet_pages import Pages, Unknown, column_of
from tests.data import kinds

RNG = np.random.default_rng(0)
DATA = [RNG.bytes(int(size)) for size in RNG.integers(0, 3000, 60)]
VALUES = [*DATA, None, b'', *DATA[:20], None, *[DATA[3]] * 40, *[None] * 9, *DATA[::-1]]
STRUCT = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])
COLUMNS = {
  'flat': pyarrow.array(VALUES), 'text': pyarrow.array([str(i) for i in range(len(VALUES))]),
  'image': pyarrow.array([None if i % 7 == 6 else {'bytes': value, 'path': str(i)}
                          for i, value in enumerate(VALUES)], STRUCT),
}
NEEDED = pyarrow.schema([('flat', pyarrow.binary(), False)])


def pages_of(path, column, group=0):
  file = pq.ParquetFile(path)
  number, level = column_of(file.schema, (column, f'{column}.bytes'))
  unpack = lambda data, size, codec: pyarrow.decompress(data, size, codec.lower(), asbytes=True)
  chunk = file.metadata.row_group(group).column(number)
  return Pages(functools.partial(storage.read, path), unpack, chunk, level)


def read(pages, count):
  known = functools.cache(pages.dictionary)
  places = map(pages.place, range(count))
  return [pages.values(page, known)[number] for page, number in places]


WRITTEN = [*itertools.product(['none', 'snappy', 'gzip', 'brotli', 'zstd'], ['1.0', '2.0'],
                              [True, False], [(2**20, 1024), (2000, 7)])]


@pytest.mark.parametrize(('codec', 'version', 'dictionary', 'sizes'), WRITTEN)
def test_values_are_those_of_pyarrow(tmp_path, codec, version, dictionary, sizes):
  path = str(tmp_path / 'a.parquet')
  pq.write_table(pyarrow.table(COLUMNS), path, compression=codec, data_page_version=version,
                 use_dictionary=dictionary, data_page_size=sizes[0], write_batch_size=sizes[1],
                 dictionary_pagesize_limit=4 * sizes[0], row_group_size=150)
  images = [each and each['bytes'] for each in COLUMNS['image'].to_pylist()]
  for column, expected in (('flat', VALUES), ('image', images)):
    found = read(pages_of(path, column), 150) + read(pages_of(path, column, 1), len(VALUES) - 150)
    assert found == expected
  if sizes[1] == 7:
    assert len(pages_of(path, 'flat')._pages) > 5


def test_required_values_and_what_is_left_to_pyarrow(tmp_path):
  path = str(tmp_path / 'a.parquet')
  pq.write_table(pyarrow.table({'flat': DATA}, NEEDED), path)
  assert read(pages_of(path, 'flat'), len(DATA)) == DATA
  for options in ({'compression': 'lz4'}, {'use_dictionary': False, 'column_encoding': {
      'flat': 'DELTA_LENGTH_BYTE_ARRAY'}}):
    pq.write_table(pyarrow.table({'flat': DATA}), path, **options)
    with pytest.raises(Unknown):
      read(pages_of(path, 'flat'), 5)
  with pytest.raises(Unknown):
    pages_of(path, 'none')
  pq.write_table(pyarrow.table({'flat': [[each] for each in DATA]}), path)
  with pytest.raises(Unknown):
    pages_of(path, 'flat.list.element')


def test_no_more_is_read_for_levels_than_their_page_has(tmp_path):
  path = str(tmp_path / 'a.parquet')
  pq.write_table(pyarrow.table(COLUMNS), path, data_page_version='2.0')
  pages = pages_of(path, 'flat')
  for length in (-1, 2**40):
    pages._pages[0].fields[5] = length
    with pytest.raises(Unknown, match='longer than their page'):
      pages.values(0, lambda: None)


@pytest.mark.parametrize('dictionary', [True, False])
def test_damage_ends_in_an_error_or_in_other_bytes(tmp_path, dictionary):
  path = tmp_path / 'a.parquet'
  pq.write_table(pyarrow.table({'flat': VALUES}), path, use_dictionary=dictionary,
                 data_page_size=2000, write_batch_size=7, dictionary_pagesize_limit=9000)
  whole, began = path.read_bytes(), time.monotonic()
  stop, outcomes = len(whole) - 1500, set()  # What follows is for pyarrow.
  for place in [*range(4, 60), *RNG.integers(60, stop, 150)]:
    data = bytearray(whole)
    data[int(place)] ^= int(RNG.integers(1, 256))
    path.write_bytes(data)
    try:
      found = read(pages_of(str(path), 'flat'), len(VALUES))
      outcomes.add('same' if found == VALUES else 'other')
      assert all(each is None or len(each) <= 2**20 for each in found)
    except Exception as error:
      assert not isinstance(error, MemoryError)
      outcomes.add('error')
  assert 'error' in outcomes and time.monotonic() - began < 60


def test_a_source_reads_one_page_for_a_picture(sources, tmp_path, monkeypatch):
  """And whole row groups where pages are not understood, with the same pictures."""
  pictures = kinds.openmoji(sources, 40)
  (tmp_path / 'set').mkdir()
  pq.write_table(kinds.table(pictures), tmp_path / 'set' / 'a.parquet', use_dictionary=False,
                 data_page_size=100, write_batch_size=1)
  options = {'test_fraction': 0, 'data_dir': str(tmp_path)}
  entries = kinds.opened(f'parquet:{tmp_path / "set"}', **options)[0].entries
  entries[0]
  read, sizes = storage.read, []
  monkeypatch.setattr(storage, 'read', lambda path, offset, size: (
    sizes.append(size) or read(path, offset, size)))
  entries = kinds.opened(f'parquet:{tmp_path / "set"}', **options)[0].entries
  entries[20]
  before = len(sizes)
  assert [entries[i].picture for i in (30, 3)] == [pictures[i][1] for i in (30, 3)]
  assert len(sizes) == before + 2
  assert sum(sizes[before:]) <= len(pictures[30][1]) + len(pictures[3][1]) + 100
  for fault in (Unknown('pages'), IndexError()):
    monkeypatch.setattr(Pages, 'values', lambda *_, fault=fault: (_ for _ in ()).throw(fault))
    again = kinds.opened(f'parquet:{tmp_path / "set"}', **options)[0]
    assert [again.entries[i].picture for i in range(40)] == [data for _, data, _ in pictures]
    assert again.entries._kept
