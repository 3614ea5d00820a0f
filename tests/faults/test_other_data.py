"""Data that are replaced while a run is stopped."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import tiny

SMALL = {'image_size': 16, 'block_out_channels': [4], 'layers_per_block': 1, 'norm_num_groups': 2}


def _picture(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
  Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def begun(once, command):
  """A run of a classifier on pictures/, with its recipe."""

  def make(folder):
    for i in range(24):
      _picture(folder / 'pictures' / 'ab'[i % 2] / f'{i}.png', i)
    config = tiny.write_config(folder / 'recipe.py', {
      'task': 'classifier', 'settings': {'classifier': SMALL}, 'weights_from': '',
      'data': {'dataset': f'folder:{folder / "pictures"}', 'size': 16, 'test_fraction': 0.0,
               'transforms': ['label', 'normalize']},
      'loop': {'total_steps': 2, 'batch_size': 4, 'checkpoint_every_steps': 1,
               'sample_every_steps': 0, 'evaluate_samples': 8},
    })
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('begun_on_pictures', make)


def _again(begun):
  return ('train', '--config', begun / 'recipe.py', '--workdir', begun / 'run', '--quiet')


def test_other_pictures_are_refused_and_a_copy_goes_on(begun, command, fails, tmp_path, capsys):
  """Of the same number and names. The way on that the sentence names is one."""
  pictures = begun / 'pictures'
  mine = shutil.copytree(pictures, tmp_path / 'mine')
  before = tiny.snapshot(begun / 'run')
  _picture(pictures / 'a' / '0.png', 1000)
  line = fails(*_again(begun))
  assert f'the pictures of the training data are not those that {begun / "run"} was trained' in line
  assert tiny.snapshot(begun / 'run').keys() >= before.keys()
  assert json.loads((begun / 'run' / 'status.json').read_text())['state'] == 'finished'
  other = ('train', '--config', begun / 'recipe.py', '--workdir', tmp_path / 'new', '--quiet')
  assert command(*other, f'--config.weights_from={begun / "run"}') == 0
  shutil.rmtree(pictures)
  shutil.copytree(mine, pictures, copy_function=shutil.copyfile)  # As new: other dates.
  capsys.readouterr()
  assert command(*_again(begun)) == 0


def test_a_damaged_record_of_the_data_is_said(begun, command, capsys):
  file = begun / 'run' / 'data.json'
  whole = file.read_text()
  for content in ('{', '[1]', '{"training": 3}'):
    file.write_text(content)
    assert command(*_again(begun)) == 0
    said = capsys.readouterr().err
    assert ('cannot be told' in said) == (content != '{"training": 3}')
    assert file.read_text() == whole


def test_other_prepared_data_are_refused(finished, copy_of, fails, small_data, tmp_path):
  from tests.data.test_splits import reordered

  run, data = copy_of(finished), shutil.copytree(small_data, tmp_path / 'data')
  for path in data.rglob('*train*array_record*'):
    reordered(path)
  line = fails('train', '--config', finished.parent / 'recipe.py', '--workdir', run,
               f'--config.data.data_dir={data}')
  assert 'the captions of the training data are not those' in line


def test_before_anything_is_saved_data_may_change(begun, command, tmp_path, capsys):
  """Who stops at once to mend a caption need not choose another workdir. What is left out is said.
  """
  for name in ('._a.png', 'loose.png'):
    shutil.copyfile(begun / 'pictures' / 'a' / '0.png', begun / 'pictures' / name)
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'data.json').write_text(json.dumps({'training': {'pictures': 'other'}}))
  assert command('train', '--config', begun / 'recipe.py', '--workdir', run, '--quiet') == 0
  assert json.loads((run / 'data.json').read_text())['training']['pictures'] != 'other'
  assert os.listdir(run / 'checkpoints')
  said = capsys.readouterr().err.splitlines()
  assert said == [
    f'diffusion_jax train: of {begun / "pictures"} not everything is used: hidden files: 1, such '
    'as ._a.png; pictures outside of the folders of classes: 1, such as loose.png.',
    'diffusion_jax train: scores are measured on the 24 pictures that are trained on: '
    'data.test_fraction is 0.',
  ]
