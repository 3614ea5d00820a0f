"""Which record of which source stands where, as often as a config says."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.build import build
from diffusion_jax.config import DataConfig, typed
from diffusion_jax.data.buckets import in_buckets
from diffusion_jax.data.cache.rows import CachedSource
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.mixture import OWN, ByPart, Mixture, Worded
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import UserError
from diffusion_jax.mixture import PartConfig, passes_of
from diffusion_jax.train.card import model_card
from tests import tiny

FIRST = {'a': 0, 'b': 1000, 'c': 2000}


def numbers(name, count, unreadable=()):
  columns = {'n': FIRST[name] + np.arange(count)}
  return ArraySource(columns, dict.fromkeys(unreadable, 'cut'))


def parts_of(**options):
  return {name: PartConfig(name, **option) for name, option in options.items()}


def mixture(counts, **options):
  return Mixture({name: numbers(name, n) for name, n in counts.items()}, parts_of(**options))


def stream(source, batches, **changes):
  loader = Loader(source, **{'batch_size': 8, 'seed': 3, 'num_threads': 0} | changes)
  return np.concatenate([next(loader)['n'] for _ in range(batches)])


COUNTS = {'a': 7, 'b': 30, 'c': 11}
SHARES = {'a': {'weight': 2.0}, 'b': {'weight': 1.0}, 'c': {'weight': 1.0}}


@pytest.mark.parametrize(('counts', 'options', 'passes'), [
  ((10, 10), ({}, {}), (1, 1)),
  ((10, 40), ({'weight': 1.0}, {'weight': 1.0}), (4, 1)),
  ((10, 40), ({'repeats': 3}, {}), (3, 1)),
  ((10, 40), ({'repeats': 0.5}, {}), (1, 2)),
  ((100, 250, 7), ({'weight': 1.0}, {'weight': 1.0}, {'share': 0.2}), (10, 4, 71)),
  ((8, 10), ({'share': 0.25}, {'share': 0.75}), (5, 12)),
])
def test_an_epoch_has_the_fewest_passes_that_give_the_shares(counts, options, passes):
  parts = [PartConfig('x', **{k: float(v) for k, v in o.items()}) for o in options]
  assert passes_of(parts, counts).passes.tolist() == list(passes)


def test_shares_are_near_to_what_is_asked_for_whatever_the_counts():
  rng = np.random.default_rng(0)
  for _ in range(30):
    counts = rng.integers(1, 3000, 3)
    weights = rng.uniform(0.05, 1, 3)
    parts = [PartConfig('x', weight=float(weight)) for weight in weights]
    np.testing.assert_allclose(
      passes_of(parts, counts).shares, weights / weights.sum(), rtol=0.0051
    )


def test_every_part_goes_over_all_its_records_before_any_comes_again():
  """And each batch has the parts in proportion, each pass in another order."""
  source = mixture(COUNTS, **SHARES)
  epoch = len(source.mixed)
  found = stream(source, 2 * epoch // 8)
  shares = source.mixed.passes.shares
  for number, (name, count) in enumerate(COUNTS.items()):
    mine = found[found // 1000 == number] - FIRST[name]
    rounds = mine[: len(mine) // count * count].reshape(-1, count)
    assert (np.sort(rounds, axis=1) == np.arange(count)).all(), name
    assert len({tuple(each) for each in rounds.tolist()}) > 0.9 * len(rounds)
    in_batches = (found.reshape(-1, 8) // 1000 == number).sum(axis=1)
    assert (np.abs(in_batches - 8 * shares[number]) <= 1.5).all()
  records, counts = np.unique(found[:epoch], return_counts=True)
  assert len(records) == len(source)
  assert counts.tolist() == np.repeat(source.mixed.passes.passes, list(COUNTS.values())).tolist()


def test_places_and_slots_are_each_others_inverse_over_many_blocks():
  source = mixture({'a': 37, 'b': 4001, 'c': 90}, **SHARES)
  order, epoch = source.mixed.order(5, True), len(source.mixed)
  slots = order.records(np.arange(epoch), 2)
  assert np.unique(slots).size == epoch > 2 * 4096
  np.testing.assert_array_equal(order(slots, 2), np.arange(epoch))
  assert (order.records(np.arange(epoch), 3) != slots).mean() > 0.9


def test_the_order_is_the_same_for_any_threads_processes_and_after_a_resume():
  source = mixture(COUNTS, **SHARES)
  whole = stream(source, 12)
  np.testing.assert_array_equal(stream(source, 12, num_threads=3), whole)
  halves = [
    np.concatenate([next(loader)['n'] for _ in range(12)]).reshape(12, 4)
    for loader in (
      Loader(source, batch_size=8, seed=3, rows=rows) for rows in (range(4), range(4, 8))
    )
  ]
  np.testing.assert_array_equal(np.concatenate(halves, axis=1).ravel(), whole)
  loader = Loader(source, batch_size=8, seed=3)
  for _ in range(5):
    next(loader)
  state, again = loader.get_state(), Loader(source, batch_size=8, seed=3)
  again.set_state(state)
  np.testing.assert_array_equal(next(again)['n'], whole[40:48])
  other = Loader(mixture(COUNTS, **SHARES | {'a': {'weight': 3.0}}), batch_size=8, seed=3)
  with pytest.raises(UserError, match=r'mixture=a 5.*% .*but this run has mixture=a 6'):
    other.set_state(state)


def test_a_new_part_leaves_the_order_within_the_others():
  both = stream(mixture({'a': 7, 'b': 30}, a={}, b={}), 37, batch_size=1)
  three = stream(mixture(COUNTS, a={}, b={}, c={}), 48, batch_size=1)
  np.testing.assert_array_equal(three[three < 2000][three[three < 2000] < 1000], both[both < 1000])


class Sized(ArraySource):
  """Records that are tall or wide, by their number."""

  def original_sizes(self):
    n = np.arange(len(self))
    return np.where((n % 3 == 0)[:, None], [40, 20], [20, 40]).astype(np.int32)

  def at_sizes(self, shapes):
    other = Sized(self._columns)
    other._columns = self._columns | {'image': [np.zeros((*shape, 3)) for shape in shapes]}
    return other


def test_batches_of_several_sizes_have_every_record_as_often():
  parts = {name: Sized({'n': FIRST[name] + np.arange(n)}) for name, n in COUNTS.items()}
  mixed = Mixture(parts, parts_of(**SHARES))
  source = in_buckets(mixed, ((4, 2), (2, 4)))
  epoch = len(mixed.mixed)
  loader = Loader(source, batch_size=8, seed=3, num_threads=0)
  batches = [next(loader) for _ in range(epoch)]
  assert {batch['image'].shape[1:3] for batch in batches} == {(4, 2), (2, 4)}
  found = np.concatenate([batch['n'] for batch in batches])
  records, counts = np.unique(found, return_counts=True)
  assert len(records) == len(mixed)
  # Eight epochs; what has not come of them waits in less than a batch of each bucket.
  wanted = 8 * np.repeat(mixed.mixed.passes.passes, list(COUNTS.values()))
  assert np.abs(counts - wanted).max() <= 1 and counts.sum() == wanted.sum()
  np.testing.assert_array_equal(mixed.original_sizes()[7:], np.concatenate([
    parts[name].original_sizes() for name in ('b', 'c')
  ]))


def test_every_record_tells_sizes_where_some_parts_do(tmp_path):
  """Of images of one size as of whole pictures, so that SDXL is told of each; none if none do."""
  for i in range(4):
    Image.new('RGB', (9, 6)).save(tmp_path / f'{i}.png')
  folder = tiny.folder_sources(tmp_path, 4, caption='a', test_fraction=0)[0]
  images = ArraySource({'image': np.zeros((4, 4, 4, 3), np.uint8), 'captions': [['b']] * 4})
  source = Mixture({'a': folder, 'b': images}, parts_of(a={}, b={}))
  batch = next(Loader(source, [], batch_size=8, seed=0, num_threads=0))
  assert {*zip(batch['part'], map(tuple, batch['sizes'].tolist()), strict=True)} == {
    ('a', (6, 9, 0, 1, 4, 4)), ('b', (4, 4, 0, 0, 4, 4))
  }
  assert 'sizes' not in Mixture({'b': images, 'c': images}, parts_of(b={}, c={}))[0]


def test_pictures_are_hashed_by_their_files_where_they_have_some(tmp_path, monkeypatch):
  """Those of other parts alone are read."""
  for i in range(4):
    Image.new('RGB', (6, 6), (i, 0, 0)).save(tmp_path / f'{i}.png')
  folder = tiny.folder_sources(tmp_path, 4, caption='a', test_fraction=0)[0]
  images = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
  images[3] = images[1]
  arrays = ArraySource({'image': images, 'captions': [['b']] * 4}, {2: 'cut'})
  source = Mixture({'a': folder, 'b': arrays}, parts_of(a={}, b={}))
  monkeypatch.setattr(type(folder), '__getitem__', None)
  found = source.hashes()
  np.testing.assert_array_equal(found[:4], folder.hashes())
  assert len({row.tobytes() for row in found[[4, 5, 6]]}) == 3
  np.testing.assert_array_equal(found[7], found[5])
  np.testing.assert_array_equal(source.hashes(np.array([6, 0, 5])), found[[6, 0, 5]])
  assert not hasattr(Mixture({'b': arrays}, parts_of(b={})), 'hashes')


def test_bad_records_are_counted_by_part_and_replaced_by_their_own():
  parts = {'a': numbers('a', 8, (1, 2)), 'b': numbers('b', 40)}
  damage = Damage()
  count = partial(Counted, most=0.3, damage=damage)
  source = Mixture(parts, parts_of(a={}, b={})).counted(count, 'training records')
  found = stream(source, 6)
  assert (found < 1000).sum() == 8 and not np.isin(found, [1, 2]).any()
  strict = Mixture(parts, parts_of(a={}, b={})).counted(
    partial(Counted, most=0.2, damage=Damage()), 'training records'
  )
  with pytest.raises(UserError, match='2 of 8 training records of a cannot be read'):
    stream(strict, 6)


class Last:
  random = False

  def __call__(self, record):
    return {name: x for name, x in record.items() if name != 'captions'} | {
      'caption': record['captions'][-1]
    }


def test_records_have_the_words_transforms_and_rate_of_their_part():
  column = lambda n: ArraySource({'captions': [['x', 'y']] * n, 'n': np.zeros(n)})
  source = Mixture(
    {'a': Worded(column(4), 'sks, ', ' art'), 'b': column(4)},
    parts_of(a={'caption_dropout': 0.5}, b={}),
  )
  by_part = ByPart({'a': build_transforms(['first_caption']), 'b': [Last()]})
  batch = next(Loader(source, [by_part], batch_size=8, seed=0, num_threads=0))
  rows = zip(batch['part'], batch['caption'], batch[OWN].tolist(), strict=True)
  assert {*rows} == {('a', 'sks, x art', 0.5), ('b', 'y', -1.0)}
  assert source.about(0)['captions'] == ['sks, x art', 'sks, y art']


def test_a_config_opens_each_part_by_itself_and_tests_are_of_all_or_of_one():
  mixed = {'round': {'dataset': 'rings', 'weight': 3}, 'half': {'dataset': 'moons', 'weight': 1}}
  config = typed(DataConfig, {'dataset': '', 'size': 64, 'mixture': mixed})
  train, test = open_data(config)
  assert config.name == 'mixture: round (rings), half (moons)'
  own = [open_data(DataConfig(name, 64)) for name in ('rings', 'moons')]
  assert len(train) == sum(len(train) for train, _ in own)
  np.testing.assert_array_equal(train[0]['points'], own[0][0][0]['points'])
  assert train.mixed.passes.shares.tolist() == [0.75, 0.25]
  firsts = [test[i]['points'] for i in (0, 1)]
  assert any(np.array_equal(firsts[0], test[0]['points']) for _, test in own)
  np.testing.assert_array_equal(test[1]['points'], own[1][1][0]['points'])
  assert train.notes[0].startswith('the mixture: round 75.0% (')
  alone = open_data(dataclasses.replace(config, test_of='half'))[1]
  np.testing.assert_array_equal(alone[3]['points'], own[1][1][3]['points'])


@pytest.mark.parametrize(('values', 'sentence'), [
  ({'dataset': 'rings'}, "set data.dataset to ''"),
  ({'mixture': {}}, 'data.dataset is empty'),
  ({'test_of': 'c'}, "data.test_of is 'c'"),
  ({'mixture': {'a': {'dataset': 'rings', 'weight': 1, 'repeats': 2}}}, 'weight and repeats'),
  ({'mixture': {'a': {'dataset': 'rings', 'weight': 1}, 'b': {'dataset': 'moons', 'repeats': 2}}},
   'all of them weights, or all repeats'),
  ({'mixture': {'a': {'dataset': 'rings', 'weight': 1}, 'b': {'dataset': 'moons'}}},
   'mixture.b has no weight'),
  ({'mixture': {'a': {'dataset': 'rings', 'share': 0.5}, 'b': {'dataset': 'moons', 'share': 0.4}}},
   'make them 1'),
  ({'mixture': {'a': {'dataset': 'rings', 'weight': 0}}}, r'mixture\.a\.weight is 0'),
  ({'mixture': {'a': {'dataset': 'rings', 'wieght': 1}}}, r'did you mean .*mixture\.a\.weight'),
])
def test_what_cannot_be_mixed_is_refused(values, sentence):
  base = {'dataset': '', 'size': 4, 'mixture': {'a': {'dataset': 'rings'}}}
  with pytest.raises(UserError, match=sentence):
    typed(DataConfig, base | values)


def test_a_cache_of_a_mixture_is_read_in_its_order():
  source = mixture(COUNTS, **SHARES)
  rows = [source[i]['n'] for i in range(len(source))]
  cached = CachedSource({'n': rows}, source)
  np.testing.assert_array_equal(stream(cached, 9), stream(source, 9))
  numbers = next(iter(cached.substitutes(9)))
  assert {int(record['n']) for record in map(numbers.__getitem__, range(len(numbers)))} == (
    {*range(1000, 1030)}
  )


def test_a_run_says_the_shares_of_its_mixture(tmp_path, capsys):
  mixed = {'round': {'dataset': 'rings', 'weight': 3}, 'half': {'dataset': 'moons', 'weight': 1}}
  values = tiny.toy_config(data={'dataset': '', 'mixture': mixed})
  training = build(values, str(tmp_path / 'run'))
  text = 'round 75.0% (2,048 records, 3 times an epoch), half 25.0%'
  assert f'the mixture: {text}' in capsys.readouterr().err
  card = model_card(training, {'kernel': np.zeros((2, 3))}, steps=1, seconds=1.0, scores={})
  assert '(mixture of round and half, ' in card and f'- Examples: {text}' in card
  assert next(training.loader)['points'].shape[1:] == (16, 2)
