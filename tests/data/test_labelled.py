"""Pictures in folders by class: labels, splits, and what is wrong with them by name."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.labelled import open_labelled
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.errors import UserError


def picture(path, shade=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def test_every_tenth_of_each_class_is_for_the_test(tmp_path):
  for name, count in (('cat', 21), ('dog', 10), ('emu', 3)):
    for i in range(count):
      picture(tmp_path / name / f'{i:02d}.png', shade=i)
  (tmp_path / 'empty').mkdir()
  picture(tmp_path / '.hidden' / 'a.png')
  train, test = open_labelled(f'folder:{tmp_path}', 4)
  assert Counter(train.labels) == {'cat': 19, 'dog': 9, 'emu': 3}
  assert [test[i]['id'] for i in range(len(test))] == ['cat/09', 'cat/19', 'dog/09']
  record = test[-2]
  assert record['label'] == 'cat' and record['captions'] == ['cat']
  assert record['image'].shape == (4, 4, 3) and (record['image'] == 19).all()
  seen = {train[i]['id'] for i in range(len(train))}
  assert len(seen) == 31 and not seen & {'cat/09', 'cat/19', 'dog/09'}
  with pytest.raises(IndexError):
    test[3]


def test_splits_may_be_folders(tmp_path):
  picture(tmp_path / 'train' / 'a' / '1.png')
  picture(tmp_path / 'train' / 'b' / '2.png')
  picture(tmp_path / 'test' / 'b' / '3.png')
  train, test = open_labelled(f'folder:{tmp_path}', 4)
  assert (train.labels, test.labels) == (['a', 'b'], ['b'])
  assert test[0]['id'] == 'b/3'


def test_what_is_wrong_is_named(tmp_path):
  with pytest.raises(UserError, match=r'there is no folder .*nowhere'):
    open_labelled(f'folder:{tmp_path / "nowhere"}', 4)
  picture(tmp_path / 'a.png')
  with pytest.raises(UserError, match='has no folders of pictures'):
    open_labelled(f'folder:{tmp_path}', 4)
  picture(tmp_path / 'a' / 'a.png')
  with pytest.raises(UserError, match=r'no class of .* has 10 pictures'):
    open_labelled(f'folder:{tmp_path}', 4)


def test_labels_become_places_among_the_classes():
  label = build_transforms(['label'], classes=('b', 'a'))[0]
  out = label({'image': np.zeros((2, 2, 3), np.uint8), 'label': 'a', 'id': 'x', 'captions': ['c']})
  assert set(out) == {'image', 'label'}
  assert out['label'] == 1 and out['label'].dtype == np.int32
  for record in ({'label': 'c', 'id': 'x'}, {'id': 'x'}):
    with pytest.raises(UserError, match=r'Record x has the label .* classes b, a'):
      label(record)
