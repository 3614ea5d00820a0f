"""Pictures in folders by class: labels, splits, and what is wrong with them by name."""

import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.errors import UserError
from tests.tiny import labelled_sources


def picture(path, shade=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def test_records_have_the_class_of_their_folder(tmp_path):
  for name, count in (('cat', 21), ('dog', 10), ('emu', 3)):
    for i in range(count):
      picture(tmp_path / name / f'{i:02d}.png', shade=i)
  (tmp_path / 'empty').mkdir()
  picture(tmp_path / '.hidden' / 'a.png')
  train, test = labelled_sources(tmp_path, 4, test_fraction=0.3)
  assert Counter(train.labels) + Counter(test.labels) == {'cat': 21, 'dog': 10, 'emu': 3}
  assert set(train.labels) == {'cat', 'dog', 'emu'} and len(test) > 0
  ids = [[source[i]['id'] for i in range(len(source))] for source in (train, test)]
  assert ids == [sorted(ids[0]), sorted(ids[1])] and len({*ids[0], *ids[1]}) == 34
  for name, record in ((ids[1][k], test[k]) for k in range(len(test))):
    label, number = name.split('/')
    assert record['label'] == label and record['captions'] == [label]
    assert record['image'].shape == (4, 4, 3) and (record['image'] == int(number)).all()
  with pytest.raises(IndexError):
    test[len(test)]


def test_splits_may_be_folders(tmp_path):
  picture(tmp_path / 'train' / 'a' / '1.png')
  picture(tmp_path / 'train' / 'b' / '2.png')
  picture(tmp_path / 'test' / 'b' / '3.png')
  train, test = labelled_sources(tmp_path, 4)
  assert (train.labels, test.labels) == (['a', 'b'], ['b'])
  assert test[0]['id'] == 'b/3'


def test_what_is_wrong_is_named(tmp_path):
  with pytest.raises(UserError, match=r'there is no folder .*nowhere'):
    labelled_sources(tmp_path / "nowhere", 4)
  picture(tmp_path / 'a.png')
  with pytest.raises(UserError, match='has no folders of pictures'):
    labelled_sources(tmp_path, 4)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
  picture(tmp_path / os.fsdecode(b'caf\xe9') / 'a.png')
  with pytest.raises(UserError, match=r'a folder of a class in .* is not UTF-8'):
    labelled_sources(tmp_path, 4)


def test_labels_become_places_among_the_classes():
  label = build_transforms(['label'], classes=('b', 'a'))[0]
  out = label({'image': np.zeros((2, 2, 3), np.uint8), 'label': 'a', 'id': 'x', 'captions': ['c']})
  assert set(out) == {'image', 'label'}
  assert out['label'] == 1 and out['label'].dtype == np.int32
  for record in ({'label': 'c', 'id': 'x'}, {'id': 'x'}):
    with pytest.raises(UserError, match=r'Record x has the label .* classes b, a'):
      label(record)
