"""Pictures split by their content, which nothing moves, and fingerprints of data."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import splits
from diffusion_jax.data.sources.arrays import open_points
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.data.splits import content_hashes, fingerprint, measured_on, spread
from diffusion_jax.errors import UserError
from tests.data.conftest import SIZE
from tests.tiny import folder_sources, labelled_sources


def picture(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def folder(path, count, first=0):
  for i in range(first, first + count):
    picture(path / f'{i:03d}.png', i)
  return path


def sides(path, **options):
  """Names of the files in (train, test)."""
  parts = folder_sources(path, 4, 'x', **options)
  return tuple({part[i]['id'] for i in range(len(part))} for part in parts)


def contents(path, names):
  return {(path / f'{name}.png').read_bytes() for name in names}


def test_no_picture_is_trained_on_and_tested(tmp_path):
  train, test = sides(folder(tmp_path / 'a', 200))
  assert not train & test and len(train | test) == 200
  assert 8 <= len(test) <= 35  # Binomial: 20 on average, deviation 4.2.
  _, source = folder_sources(tmp_path / "a", 4, 'x')
  measured = measured_on(source)
  assert not measured.trained_on
  assert measured.sentence == (
    f'On {len(test)} of 200 pictures, chosen by their content, which are not trained on.'
  )


def test_names_copies_and_more_pictures_move_none(tmp_path):
  path = folder(tmp_path / 'a', 60)
  train, test = (contents(path, names) for names in sides(path))
  other = tmp_path / 'b'
  other.mkdir()
  for i, file in enumerate(sorted(path.iterdir(), reverse=True)):
    shutil.copyfile(file, other / f'z{i}.png')
    shutil.copyfile(file, other / f'copy of {i}.png')
  folder(other, 40, first=100)
  more = [contents(other, names) for names in sides(other)]
  assert train <= more[0] and test <= more[1] and not more[0] & more[1]


def test_a_larger_share_only_adds_to_the_test(tmp_path):
  path = folder(tmp_path / 'a', 60)
  few, many = (sides(path, test_fraction=share)[1] for share in (0.1, 0.5))
  assert few < many and 15 <= len(many) <= 45


@pytest.mark.parametrize(('count', 'share', 'why'), [
  (4, 0.1, 'they are too few for a test part'), (40, 0.0, 'data.test_fraction is 0'),
])
def test_all_are_trained_on_where_they_are_few_or_it_is_asked_for(tmp_path, count, share, why):
  path = folder(tmp_path / 'a', count)
  train, test = sides(path, test_fraction=share)
  assert train == test and len(train) == count
  measured = measured_on(folder_sources(path, 4, 'x', test_fraction=share)[1])
  assert measured == (f'On the {count} pictures that are trained on: {why}.', True)


def files_of(part):
  return [part.entries.files[i] for i in part.numbers]


def test_every_class_is_trained_on(tmp_path):
  for i in range(60):
    folder(tmp_path / f'class{i:02d}', 1, first=i)
  folder(tmp_path / 'common', 60, first=100)
  train, test = labelled_sources(tmp_path, 4)
  assert len(set(train.labels)) == 61 and set(test.labels) == {'common'}
  bytes_of = lambda part: {file.read_bytes() for file in files_of(part)}
  assert not bytes_of(train) & bytes_of(test)


def test_a_split_of_one_s_own_is_taken_as_it_is(tmp_path):
  folder(tmp_path / 'train', 3)
  folder(tmp_path / 'test', 2, first=3)
  assert sides(tmp_path) == ({'000', '001', '002'}, {'003', '004'})
  measured = measured_on(folder_sources(tmp_path, 4, 'x')[1])
  assert measured == ('On the test split, which was not trained on.', False)


def test_pictures_on_both_sides_of_such_a_split_are_told(tmp_path):
  folder(tmp_path / 'train' / 'a', 5)
  folder(tmp_path / 'test' / 'a', 3, first=3)  # Two of them under the same names.
  picture(tmp_path / 'test' / 'a' / 'other name.png', 0)
  told = 'On the test split, of whose 4 pictures 3 are trained on, too.'
  assert measured_on(folder_sources(tmp_path, 4, 'x')[1]).sentence == told
  assert measured_on(labelled_sources(tmp_path, 4)[1]).sentence == told


@pytest.fixture
def opened_files(monkeypatch):
  """Names of the files that hashes were read of."""
  monkeypatch.setattr('diffusion_jax.data.sources.file_hashes._SETTLED', 0)
  read, found = splits.content_hash, []
  monkeypatch.setattr(
    splits, 'content_hash', lambda file: found.append(os.path.basename(file.name)) or read(file)
  )
  return found


def test_hashes_of_files_are_kept_while_nothing_of_them_changes(tmp_path, opened_files):
  path, options = folder(tmp_path / 'a', 40), {'data_dir': str(tmp_path / 'kept')}
  first = sides(path, **options)
  assert len(opened_files) == 40
  opened_files.clear()
  assert sides(path, **options) == first and not opened_files
  train = folder_sources(path, 4, 'x', **options)[0]
  (path / '036.png').touch()  # While it is in use, and of a part alone.
  assert len(train.hashes()) == len(train) and len(opened_files) <= 1
  opened_files.clear()
  assert sides(path, **options) == first and len(opened_files) <= 1
  opened_files.clear()
  assert sides(path, **options) == first and not opened_files
  changed = [path / f'{i:03d}.png' for i in range(5)]
  before = changed[0].stat()
  data = bytearray(changed[0].read_bytes())
  data[-1] ^= 1
  changed[0].write_bytes(data)  # As long, and with the old time.
  os.utime(changed[0], ns=(before.st_atime_ns, before.st_mtime_ns))
  os.utime(changed[1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
  picture(changed[2], 99)
  changed[3].rename(path / 'other.png')
  changed[4].unlink()
  shutil.copy(path / '030.png', path / '031.png')  # Another file's content.
  after = sides(path, **options)
  assert sorted(opened_files) == ['000.png', '001.png', '002.png', '031.png', 'other.png']
  opened_files.clear()
  assert sides(path, data_dir=str(tmp_path / 'elsewhere')) == after and len(opened_files) == 39
  (kept,) = (tmp_path / 'kept' / 'indexes').iterdir()
  for damage in (kept.read_bytes()[:-5], b'', b'no array', kept.read_bytes()[:-3000]):
    kept.write_bytes(damage)
    opened_files.clear()
    assert sides(path, **options) == after and len(opened_files) == 39


def test_files_that_have_just_changed_are_not_kept(tmp_path, opened_files, monkeypatch):
  monkeypatch.undo()
  path, kept = folder(tmp_path / 'a', 30), tmp_path / 'kept'
  before = sides(path, data_dir=str(kept))
  picture(path / '003.png', 99)
  after = sides(path, data_dir=str(kept))
  assert after == sides(path, data_dir=str(tmp_path / 'other')) and before
  assert len(np.load(next(kept.rglob('*.npy')))) == 1


@pytest.mark.parametrize('share', [-0.1, 1.0, float('nan')])
def test_shares_that_are_none(fails, tmp_path, share):
  arguments = ('train', '--config', 'configs/finetune/lora.py', '--workdir', tmp_path / 'run')
  line = fails(*arguments, f'--config.data.test_fraction={share}')
  assert 'data.test_fraction is' in line and 'from 0' in line
  line = fails('train', '--config', 'configs/openmoji/clip.py', '--workdir', tmp_path / 'run',
               '--config.data.test_fraction=0.2')
  assert 'data.test_fraction has no effect on openmoji' in line


def test_a_picture_that_cannot_be_read_has_a_side_and_is_named_when_it_is_wanted(tmp_path):
  folder(tmp_path, 40)
  (tmp_path / '020.png').write_bytes(b'')
  train, test = folder_sources(tmp_path, 4, 'x')
  assert len(train) + len(test) == 40
  (tmp_path / '021.png').unlink()
  for number in ('020', '021'):
    path = tmp_path / f'{number}.png'
    part = train if path in files_of(train) else test
    with pytest.raises(UserError, match=rf'{number}\.png'):
      part[files_of(part).index(path)]
  assert len(content_hashes([*files_of(train), *files_of(test)])) == 40


@pytest.fixture
def made(tmp_path):
  for i in range(6):
    picture(tmp_path / 'data' / 'xy'[i % 2] / f'{i}.png', i)
  (tmp_path / 'data' / 'metadata.csv').write_text(
    'file_name,text\n' + ''.join(f'{"xy"[i % 2]}/{i}.png,caption {i}\n' for i in range(6))
  )
  return tmp_path / 'data'


def of(made):
  return fingerprint(folder_sources(made, 4)[0])


def test_a_copy_elsewhere_is_the_same(made, tmp_path):
  copy = shutil.copytree(made, tmp_path / 'copy')
  for path in copy.rglob('*'):
    os.utime(path, (0, 0))
  assert of(copy) == of(made)
  assert fingerprint(labelled_sources(copy, 4)[0]) == (
    fingerprint(labelled_sources(made, 4)[0])
  )


@pytest.mark.parametrize(('change', 'changed'), [
  (lambda f: (f / 'metadata.csv').write_text(
    (f / 'metadata.csv').read_text().replace('caption 3', 'caption 4')), 'captions'),
  (lambda f: (f / 'x' / '0.png').write_bytes((f / 'x' / '2.png').read_bytes()), 'pictures'),
  (lambda f: _flip_a_byte(f / 'y' / '5.png'), 'pictures'),
])
def test_changes_are_seen_and_told_apart(made, change, changed):
  before = of(made)
  change(made)
  after = of(made)
  assert {part for part in before if before[part] != after[part]} == {changed}


def _flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[-20] ^= 1
  path.write_bytes(data)


def test_another_name_is_another_picture(made):
  before = fingerprint(labelled_sources(made, 4)[0])
  (made / 'x' / '0.png').rename(made / 'y' / '0.png')
  assert fingerprint(labelled_sources(made, 4)[0]) != before


def reordered(path):
  """The same records in another order: as many, of the same sizes."""
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  reader = ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  path.unlink()
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for record in reversed(records):
    writer.write(record)
  writer.close()


def test_prepared_records(data_dir, tmp_path):
  opened = lambda root: open_source('openmoji', 'train', size=SIZE, data_dir=str(root))
  copy = shutil.copytree(data_dir, tmp_path / 'copy')
  before = fingerprint(opened(data_dir))
  assert before and fingerprint(opened(copy)) == before
  for path in copy.rglob('*train*array_record*'):
    reordered(path)
  changed = opened(copy)
  after = fingerprint(changed)
  assert len(changed) == len(opened(data_dir))
  assert all(after[part] != before[part] for part in ('captions', 'pictures'))


def test_what_is_computed_has_none():
  assert fingerprint(open_points('moons', 'train', 16)) == {}


def test_a_sample_is_spread_over_all():
  assert spread(5, 10) == [0, 1, 2, 3, 4] and spread(0, 3) == []
  assert spread(1001, 3) == [0, 500, 1000]
