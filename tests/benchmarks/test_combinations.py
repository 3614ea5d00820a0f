"""The judge of unseen combinations, on the real pictures of them and on pictures made wrong."""

import numpy as np
import pytest

from benchmarks import combinations
from benchmarks.combinations import Combination


@pytest.fixture(scope='module')
def data():
  found = combinations.read()
  for name, count in (('train', 400), ('test', 40)):  # Whole figures: they stand together.
    pictures, shown = found[name]
    kept = {one.who for one in found['test'][1][:40]}
    rows = [i for i, one in enumerate(shown) if one.who in kept][:count]
    found[name] = pictures[rows], [shown[i] for i in rows]
  return found


def test_a_caption_is_of_one_person_in_one_tone():
  assert combinations.combination('man farmer medium-light skin tone') == Combination(
    'man farmer', 'medium-light'
  )
  assert combinations.combination('red heart') is None


def test_real_pictures_of_combinations_that_training_lacks_are_judged_right(data):
  train, (pictures, shown) = data['train'], data['test']
  assert not set(train[1]) & set(shown)
  judge = combinations.Judge(*train)
  told = combinations.shares(judge(pictures), shown)
  assert told['right'] > 0.9
  dark = pictures.copy()
  for name, colour in combinations.SKIN.items():  # All have the skin of another.
    if name != 'dark':
      dark[(np.abs(pictures - np.array(colour)).max(axis=-1) < 3)] = combinations.SKIN['dark']
  told = judge(dark)
  assert np.mean([one.tone == 'dark' for one in told]) > 0.9
  assert combinations.shares(told, shown)['who'] > 0.8


def test_other_pictures_are_judged_wrong(data):
  judge, (pictures, shown) = combinations.Judge(*data['train']), data['test']
  assert combinations.shares(judge(np.roll(pictures, 5, axis=0)), shown)['right'] < 0.2
  assert combinations.shares(judge(np.full_like(pictures, 255)), shown)['right'] < 0.2
