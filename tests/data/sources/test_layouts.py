"""What lies in tar files, tables and records, in every usual layout; and what must not be there."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffusion_jax.config import DataConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.records import HEADER
from diffusion_jax.data.unreadable import Counted, Damage, readable
from diffusion_jax.errors import Unreadable, UserError
from tests.data import kinds
from tests.data.foreign_set import write_foreign_set

OPTIONS = {'test_fraction': 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('DIFFUSION_JAX_DATA', str(tmp_path / 'cache'))


def png(shade, width=8, height=6):
  data = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(data, 'PNG')
  return data.getvalue()


def write_tar(path, members):
  """(name, bytes, or fields of a header without content)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, data, *fields in members:
      kinds.add(tar, name, data, **dict(*fields))


def told(source):
  return [(r['id'], r['captions'], r.get('label')) for r in source]


def test_members_of_one_key_are_a_record(tmp_path):
  write_tar(tmp_path / 'a.tar', [
    ('b/2.cls', b'7\n'), ('b/2.jpg', png(2)), ('b/2.json', b'{"caption": "two", "url": "x"}'),
    ('./a/1.seg.PNG', png(1)), ('a/1.txt', b'one\neins\n'), ('README', b'x'),
    ('c.webp', png(3)), ('c.json', b'{"text": [["three", 2], "drei"], "label": "odd"}'),
    ('c.png', png(9)),
  ])
  write_tar(tmp_path / 'b.tar', [('aa.png', png(4)), ('aa.caption', b'four')])
  (tmp_path / 'other.txt').touch()
  for pattern in ('{0}', '{0}/*.tar', '{0}/{{a..b}}.tar', '{0}/?.tar'):
    if '..' in pattern:
      continue
    source, _ = kinds.opened(f'tar:{pattern.format(tmp_path)}', **OPTIONS)
    assert told(source) == [
      ('a/1', ['one', 'eins'], None), ('aa', ['four'], None), ('b/2', ['two'], '7'),
      ('c', ['three', 'drei'], 'odd'),
    ]
  assert source[3]['caption_weights'] == [2, 1] and source.labels == ['7', 'odd']
  assert [source[i]['image'][0, 0, 0] for i in range(4)] == [1, 4, 2, 3]
  assert 'members of records that have one already: 1, such as c.png' in source.notes[0]
  again, _ = kinds.opened(f'tar:{tmp_path}', **OPTIONS)
  assert again.notes[0].partition('not')[2] == source.notes[0].partition('not')[2]
  shutil.copy(tmp_path / 'b.tar', tmp_path / 'a.tar')  # What is kept is of other files.
  assert len(kinds.opened(f'tar:{tmp_path}', **OPTIONS)[0]) == 2


def test_numbered_shards_and_splits_by_name(tmp_path):
  for number in range(12):
    name = 'train' if number < 9 else 'val'
    write_tar(tmp_path / f'{name}-{number:03d}.tar', [(f'{number}.png', png(number))])
  train, test = kinds.opened(f'tar:{tmp_path}', caption='x')
  assert (len(train), len(test)) == (9, 3) and not test.measured.trained_on
  train, test = kinds.opened(f'tar:{tmp_path}/train-{{001..004}}.tar', caption='x')
  assert (len(train), len(test)) == (4, 4) and test.measured.trained_on
  with pytest.raises(UserError, match=r'there is no tar file \(\.tar\) at .*{020\.\.030}'):
    kinds.opened(f'tar:{tmp_path}/train-{{020..030}}.tar')


def test_names_that_lead_out_and_links_read_and_write_nothing(tmp_path):
  (tmp_path / 'secret.png').write_bytes(png(99))
  inside = tmp_path / 'in'
  link = {'type': tarfile.SYMTYPE, 'linkname': str(tmp_path / 'secret.png')}
  hard = {'type': tarfile.LNKTYPE, 'linkname': '../secret.png'}
  write_tar(inside / 'a.tar', [
    ('/etc/a.png', png(1)), ('../../b.png', png(2)), ('c.png', b'', link), ('d.png', b'', hard),
    ('e.png', b'', {'type': tarfile.FIFOTYPE}), ('f/../../g.png', png(3)),
  ])
  before = {path for path in tmp_path.rglob('*') if 'cache' not in path.parts}
  source, _ = kinds.opened(f'tar:{inside}', caption='x', **OPTIONS)
  assert sorted(r['image'][0, 0, 0] for r in source) == [1, 2, 3]
  assert {path for path in tmp_path.rglob('*') if 'cache' not in path.parts} == before
  assert 'links in tar files: 2' in source.notes[0]
  assert 'what is no regular file in tar files: 1' in source.notes[0]


def test_bad_members_of_tar_files(tmp_path):
  """Texts that are none, texts without a picture, and what is behind the damage of an archive."""
  path = tmp_path / 'a.tar'
  write_tar(path, [
    ('a.png', png(1)), ('a.txt', b'caf\xe9'), ('b.txt', b'a text alone'), ('c.png', png(2)),
    ('c.json', b'{"text": '), ('d.png', png(3)), ('d.txt', b'good'), ('e.png', png(4)),
  ])
  with path.open('r+b') as file:
    file.truncate(8 * 1024 - 600)
  source, damage = kinds.opened(f'tar:{path}', **OPTIONS)[0], Damage()
  good = list(readable(Counted(source, 1.0, damage, 'records')))
  assert [r['id'] for r in good] == ['d']
  assert damage.causes == {'bad text': 2, 'missing': 2}
  path.unlink()
  with pytest.raises(Unreadable, match=r'd\.png in .*a\.tar cannot be read') as error:
    source[3]
  assert error.value.cause == 'not readable'


def write_table(path, columns, features=None, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pyarrow.table(columns)
  if features:
    said = {'huggingface': json.dumps({'info': {'features': features}})}
    table = table.replace_schema_metadata(said)
  pyarrow.parquet.write_table(table, path, **options)


def test_tables_of_every_layout(tmp_path):
  data = [png(shade) for shade in range(5)]
  struct = [{'bytes': each, 'path': f'x/{i}.png'} for i, each in enumerate(data)]
  label = {'_type': 'ClassLabel', 'names': ['cat', 'dog']}
  write_table(tmp_path / 'a' / 'train-0.parquet', {
    'photo': struct, 'label': [0, 1, 0, -1, 1], 'score': [0.5] * 5,
  }, {'photo': {'_type': 'Image'}, 'label': label})
  train, _ = kinds.opened(f'parquet:{tmp_path / "a"}', caption='a {label}\n{name}', **OPTIONS)
  assert train.labels == ['cat', 'dog', 'cat', 'dog']
  assert train[0]['captions'] == ['a cat'] and train[0]['id'] == 'x/0'  # 0 is no word.
  with pytest.raises(Unreadable, match=r'row 3 .*has no caption'):
    train[3]
  config = DataConfig(f'parquet:{tmp_path / "a"}', 4, caption='of all', test_fraction=0.0)
  labelled = open_data(config, labels_for='a classifier')[0]
  assert labelled[1]['label'] == 'dog' and labelled.labels == ['cat', 'dog', 'cat', 'dog']
  with pytest.raises(Unreadable, match='has no label') as error:
    labelled[3]
  assert error.value.cause == 'no label'
  write_table(tmp_path / 'b.parquet', {
    '__key__': [f'k{i}' for i in range(5)], 'jpg': data, 'Prompt': ['p'] * 5, 'tags': [['t']] * 5,
    'json': ['{}'] * 5,
  }, row_group_size=2)
  train, _ = kinds.opened(f'parquet:{tmp_path / "b.parquet"}', **OPTIONS)
  assert told(train) == [(f'k{i}', ['p'], None) for i in range(5)]
  assert [train[i]['image'][0, 0, 0] for i in (4, 0, 3)] == [4, 0, 3]
  tagged, _ = kinds.opened(f'parquet:{tmp_path / "b.parquet"}', caption_column='tags', **OPTIONS)
  assert tagged[0]['captions'] == ['t']
  with pytest.raises(UserError, match=r'a classifier needs labels, but .* has none'):
    open_data(DataConfig(f'parquet:{tmp_path / "b.parquet"}', 4), labels_for='a classifier')
  write_table(tmp_path / 'c.parquet', {'image': ['a.png'], 'text': ['x']})
  with pytest.raises(UserError, match=r'c\.parquet has no column of pictures, but image, text'):
    kinds.opened(f'parquet:{tmp_path / "c.parquet"}')
  (tmp_path / 'd.parquet').write_bytes((tmp_path / 'b.parquet').read_bytes()[:-20])
  with pytest.raises(UserError, match=r'd\.parquet is no whole file of Parquet'):
    kinds.opened(f'parquet:{tmp_path / "d.parquet"}')


def test_bad_cells_of_tables(tmp_path, monkeypatch):
  text = pyarrow.array([b'good', b'caf\xe9', b'x', b'y'])
  text = pyarrow.Array.from_buffers(pyarrow.string(), 4, text.buffers())
  struct = [{'bytes': each, 'path': '/etc/passwd'} for each in (png(1), png(2), None, png(3))]
  write_table(tmp_path / 'a.parquet', {'image': struct, 'text': text}, row_group_size=2)
  source, damage = kinds.opened(f'parquet:{tmp_path}', **OPTIONS)[0], Damage()
  assert [r['captions'] for r in readable(Counted(source, 1.0, damage, 'records'))] == [
    ['good'], ['y']
  ]
  assert damage.causes == {'bad text': 1, 'missing': 1}
  monkeypatch.setattr('diffusion_jax.data.parquet_pages._CODECS', ())  # By row group, then.
  # One that is too large to keep is read forwards, and from its start for what is before.
  monkeypatch.setattr('diffusion_jax.data.sources.tables.STREAMED', 0)
  monkeypatch.setattr('diffusion_jax.data.sources.tables.ROWS', 1)
  large, _ = kinds.opened(f'parquet:{tmp_path}', caption_column='none', caption='z', **OPTIONS)
  assert [large[i]['image'][0, 0, 0] for i in (3, 0, 1, 3, 0)] == [3, 1, 2, 3, 1]
  assert not large.entries._kept
  monkeypatch.undo()
  data = bytearray((tmp_path / 'a.parquet').read_bytes())
  data[10:60] = b'\xff' * 50
  (tmp_path / 'a.parquet').write_bytes(data)
  fresh, damage = kinds.opened(f'parquet:{tmp_path}', **OPTIONS)[0], Damage()
  assert [r['captions'] for r in readable(Counted(fresh, 1.0, damage, 'records'))] == [['y']]
  assert damage.causes['damaged'] == 2


def test_arrow_of_several_splits_as_files_and_streams(tmp_path):
  made = [(f'{i}', png(i), [f'caption {i}']) for i in range(6)]
  for split, part in (('train', made[:4]), ('test', made[4:])):
    kinds.as_arrow(tmp_path / 'set' / split, part)
  (tmp_path / 'set' / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  (tmp_path / 'set' / 'train' / 'cache-1.arrow').write_bytes(b'')
  train, test = kinds.opened(f'arrow:{tmp_path / "set"}')
  assert [r['captions'] for r in (*train, *test)] == [[f'caption {i}'] for i in range(6)]
  assert test.measured.sentence == 'On the test split, which was not trained on.'
  found = kinds.table(made)
  with pyarrow.ipc.new_file(tmp_path / 'a.arrow', found.schema) as file:
    file.write_table(found)
  assert len(kinds.opened(f'arrow:{tmp_path / "a.arrow"}', **OPTIONS)[0]) == 6
  (tmp_path / 'a.arrow').write_bytes(b'ARROW')
  with pytest.raises(UserError, match=r'a\.arrow is no whole file of Arrow'):
    kinds.opened(f'arrow:{tmp_path / "a.arrow"}')


def test_labelled_sets_of_tfds(tmp_path, monkeypatch):
  """By name, from where TFDS keeps them; classes are captions, also in a sentence."""
  write_foreign_set(tmp_path / 'sets')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'sets'))
  train, test = kinds.opened('tfds:foreign_set', 4)
  assert (len(train), len(test)) == (3, 2) and sorted(train.labels) == ['cat', 'cat', 'fox']
  assert train[0]['captions'][0].startswith('picture ') and train[0]['image'].shape == (4, 4, 3)
  train, _ = kinds.opened('tfds:foreign_set/1.0.0', 4, caption='a {label}', caption_column='none',
                          data_dir=str(tmp_path / 'sets'))
  assert {(r['label'], *r['captions']) for r in train} == {('cat', 'a cat'), ('fox', 'a fox')}
  train, _ = kinds.opened('tfds:foreign_set', 4, caption_column='none')
  assert train[0]['captions'] == [train[0]['label']]
  with pytest.raises(UserError, match=r'the data set nothing is not in .*sets'):
    kinds.opened('tfds:nothing', 4)
  for name in ('../sets', 'a/../b', ''):
    with pytest.raises(UserError, match='give tfds:NAME'):
      kinds.opened(f'tfds:{name}', 4)


@pytest.fixture
def records(tmp_path):
  made = [(f'{i}', png(i), [f'caption {i}']) for i in range(6)]
  kinds.as_records(tmp_path / 'set', made)
  return tmp_path / 'set'


@pytest.mark.parametrize(('change', 'message'), [
  ({'version': 2}, 'it is not of diffusion_jax.records 1'),
  ({'splits': {'train': [{'file': '../a.array_record', 'records': 1}]}}, 'is not in it'),
  ({'splits': {'train': [{'file': '/etc/passwd', 'records': 1}]}}, 'is not in it'),
  ({'splits': {'train': [{'file': 'none.array_record', 'records': 1}]}}, 'No such file'),
  ({'splits': {'train': [{'file': 'train-00000-of-00002.array_record', 'records': 9}]}},
   'not of its 9 records'),
  ({'splits': {'train': [{'file': 'train-00000-of-00002.array_record', 'records': -1}]}},
   'no number of records'),
  ({'splits': {'test': []}}, 'has no split train'), ({'splits': 5}, 'cannot be read'),
  ({'classes': [1]}, 'a name is no text'), ({'measured': ['x']}, 'no sentence'),
])
def test_headers_of_records_that_are_none(records, change, message):
  values = json.loads((records / HEADER).read_text())
  (records / HEADER).write_text(json.dumps(values | change))
  with pytest.raises(UserError, match=message):
    kinds.opened(f'records:{records}')


def test_damaged_records_are_named(records, tmp_path):
  shard = records / 'train-00000-of-00002.array_record'
  data = bytearray(shard.read_bytes())
  place = data.index(b'"id": "1"')
  data[place + 3] ^= 0xFF
  shard.write_bytes(data)
  source, damage = kinds.opened(f'records:{records}', **OPTIONS)[0], Damage()
  found = [r['id'] for r in readable(Counted(source, 1.0, damage, 'records'))]
  assert found == ['0', '2', '3', '4', '5'] and damage.causes == {'damaged': 1}
  assert 'the record 1 of train-00000-of-00002.array_record' in damage.sentences[0]
  shutil.move(shard, tmp_path / 'elsewhere')
  shard.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='it is a link out of the folder'):
    kinds.opened(f'records:{records}')
  (records / HEADER).unlink()
  with pytest.raises(UserError, match=r'there are no records in .*set \(no records\.json\)'):
    kinds.opened(f'records:{records}')
