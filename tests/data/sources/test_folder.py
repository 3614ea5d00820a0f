"""Folders of pictures: captions, sizes, splits, and what is wrong with them by name.

Pictures in folders by class: labels, splits, and what is wrong with them by name.
"""

import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources.folder import Alternating
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.errors import UserError
from tests.tiny import folder_sources, labelled_sources


def picture(path, width=8, height=8, **options):
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[:, : width // 2] = 200
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, **options)


def test_captions_come_from_beside_from_the_list_or_for_all(tmp_path):
  for name in ('a.png', 'b.jpg', 'c.webp', 'd.txt.png'):
    picture(tmp_path / name)
  picture(tmp_path / '.e.png.1.tmp.png')  # Being written.
  (tmp_path / 'a.txt').write_text('an apple\n\n a red apple \n')
  rows = [{'file_name': 'a.png', 'text': 'no'}, {'file_name': 'b.jpg', 'text': 'a boat'}]
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  train, test = folder_sources(tmp_path, 4, 'a thing\nthe thing')
  found = {train[i]['id']: train[i]['captions'] for i in range(len(train))}
  both = ['a thing', 'the thing']
  assert found == {
    'a': ['an apple', 'a red apple'], 'b': ['a boat'], 'c': both, 'd.txt': both
  }
  assert len(test) == 4 and test[-1]['id'] == 'd.txt'
  with pytest.raises(IndexError):
    train[4]


def test_splits_are_folders(tmp_path):
  picture(tmp_path / 'train' / 'a.png')
  picture(tmp_path / 'test' / 'b.png')
  assert [s[0]['id'] for s in folder_sources(tmp_path, 4, 'x')] == ['a', 'b']


def test_sizes_are_of_the_file_and_of_the_square_in_it(tmp_path):
  picture(tmp_path / 'a.png', width=40, height=16)
  picture(tmp_path / 'b.png', width=8, height=24)
  turned = Image.Exif()
  turned[0x0112] = 6  # Lying on its side.
  picture(tmp_path / 'c.jpg', width=40, height=16, exif=turned)
  source, _ = folder_sources(tmp_path, 8, 'x')
  assert source[0]['sizes'].tolist() == [16, 40, 0, 6, 8, 8]
  assert source[1]['sizes'].tolist() == [24, 8, 8, 0, 8, 8]
  assert source[2]['sizes'].tolist() == [40, 16, 6, 0, 8, 8]
  image = source[0]['image']
  assert image.shape == (8, 8, 3) and image.dtype == np.uint8
  assert image[4, 1, 0] > 190 and image[4, 6, 0] < 10


def test_a_height_and_a_width_cut_the_middle_of_what_covers_them(tmp_path):
  """And SDXL is told where."""
  pixels = np.zeros((16, 40, 3), np.uint8)
  pixels[:, 12:28] = 255
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  picture(tmp_path / 'b.png', width=8, height=24)
  for size, first, second in (
    ((8, 16), [16, 40, 0, 2, 8, 16], [24, 8, 20, 0, 8, 16]),
    ((16, 8), [16, 40, 0, 16, 16, 8], [24, 8, 4, 0, 16, 8]),
  ):
    source, _ = folder_sources(tmp_path, size, 'x')
    assert [source[i]['image'].shape for i in (0, 1)] == [(*size, 3)] * 2
    assert source[0]['sizes'].tolist() == first and source[1]['sizes'].tolist() == second
    white = (source[0]['image'][..., 0] > 127).mean(axis=0)
    np.testing.assert_array_equal(white, [0, 0, 0, 0, *[1] * 8, 0, 0, 0, 0] if size[1] == 16 else 1)
  square, same = (folder_sources(tmp_path, size, 'x')[0] for size in (8, (8, 8)))
  np.testing.assert_array_equal(square[0]['image'], same[0]['image'])


@pytest.mark.parametrize(('name', 'content', 'message'), [
  (None, None, r'has no picture \(.png'),
  ('a.png', None, r'a.png has no caption; write a.txt beside it'),
  ('metadata.jsonl', b'{"file_name": "a.png"}', r'a.png has no caption \(lists without a column'),
  ('metadata.jsonl', b'not json', r'metadata.jsonl cannot be read \(line 1: '),
  ('a.txt', b'caf\xe9', r'a.txt cannot be read'),
  ('a.txt', b' \n', r'a.png has no caption'),
])
def test_what_is_wrong_is_named(tmp_path, name, content, message):
  if name:
    picture(tmp_path / 'a.png')
  if content:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    folder_sources(tmp_path, 4)


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'no picture')
  source, _ = folder_sources(tmp_path, 4, 'x')
  with pytest.raises(UserError, match=r'a.png cannot be read'):
    source[0]


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(UserError, match=r'there is no folder .*nowhere'):
    folder_sources(tmp_path / "nowhere", 4)


def test_two_sources_in_turn():
  """Means over one epoch are those of both sources, the shorter one over and over."""
  both = Alternating([{'x': 1}, {'x': 2}], [{'x': 10}, {'x': 20}, {'x': 30}, {'x': 40}], 0.25)
  rows = [both[i] for i in range(len(both))]
  assert [row['x'] for row in rows] == [1, 10, 2, 20, 1, 30, 2, 40]
  assert {row['weight'] for row in rows[::2]} == {2.0}
  assert {row['weight'] for row in rows[1::2]} == {0.5}
  assert np.mean([row['x'] * row['weight'] for row in rows]) == 1.5 + 0.25 * 25


def shaded(path, shade=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def test_records_have_the_class_of_their_folder(tmp_path):
  for name, count in (('cat', 21), ('dog', 10), ('emu', 3)):
    for i in range(count):
      shaded(tmp_path / name / f'{i:02d}.png', shade=i)
  (tmp_path / 'empty').mkdir()
  shaded(tmp_path / '.hidden' / 'a.png')
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


def test_classes_in_folders_of_splits(tmp_path):
  shaded(tmp_path / 'train' / 'a' / '1.png')
  shaded(tmp_path / 'train' / 'b' / '2.png')
  shaded(tmp_path / 'test' / 'b' / '3.png')
  train, test = labelled_sources(tmp_path, 4)
  assert (train.labels, test.labels) == (['a', 'b'], ['b'])
  assert test[0]['id'] == 'b/3'


def test_what_has_no_classes_is_named(tmp_path):
  with pytest.raises(UserError, match=r'there is no folder .*nowhere'):
    labelled_sources(tmp_path / "nowhere", 4)
  shaded(tmp_path / 'a.png')
  with pytest.raises(UserError, match='has no folders of pictures'):
    labelled_sources(tmp_path, 4)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
  shaded(tmp_path / os.fsdecode(b'caf\xe9') / 'a.png')
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
