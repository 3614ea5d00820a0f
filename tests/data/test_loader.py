"""The loader: every example once, anew each epoch, and the same again after a restart."""

import json

import numpy as np
import pytest

from diffusion_jax.data.loader import Loader
from diffusion_jax.data.sources import ArraySource, open_source
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.errors import UserError

EXAMPLES = 31


class Noise:
  """A random transform whose draw shows in the batch."""

  random = True

  def __call__(self, record, rng):
    return record | {'noise': rng.random()}


def _source(examples=EXAMPLES):
  return ArraySource({'n': np.arange(examples), 'name': [f'r{i}' for i in range(examples)]})


def _loader(transforms=(), **changes):
  return Loader(_source(), transforms, **{'batch_size': 4, 'seed': 3, **changes})


def _take(loader, batches):
  return [next(loader) for _ in range(batches)]


def _numbers(batches):
  return [int(n) for batch in batches for n in batch['n']]


def _assert_same(a, b):
  assert len(a) == len(b)
  for left, right in zip(a, b, strict=True):
    assert set(left) == set(right)
    for name, value in left.items():
      np.testing.assert_array_equal(value, right[name])


def test_batches_are_columns():
  batch = next(_loader(shuffle=False))
  np.testing.assert_array_equal(batch['n'], [0, 1, 2, 3])
  assert batch['name'] == ['r0', 'r1', 'r2', 'r3']


def test_each_epoch_has_every_example_once_across_batches():
  """31 examples in batches of 4: no batch is short and none is lost at an epoch's end."""
  batches = _take(_loader(), EXAMPLES)
  numbers = _numbers(batches)
  assert all(len(batch['n']) == 4 for batch in batches)
  epochs = np.reshape(numbers, (4, EXAMPLES))
  for epoch in epochs:
    assert sorted(epoch) == list(range(EXAMPLES))
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert list(epochs[0]) != list(range(EXAMPLES))


def test_order_without_shuffle():
  numbers = _numbers(_take(_loader(shuffle=False), 10))
  assert numbers == [i % EXAMPLES for i in range(40)]


def test_seeds_differ_and_repeat():
  assert _numbers(_take(_loader(), 7)) == _numbers(_take(_loader(), 7))
  assert _numbers(_take(_loader(), 7)) != _numbers(_take(_loader(seed=4), 7))


@pytest.mark.parametrize('num_epochs', [1, 2])
def test_processes_share_an_epoch(num_epochs):
  shards = [
    _numbers(_loader(process_index=i, process_count=3, num_epochs=num_epochs)) for i in range(3)
  ]
  assert sorted(n for shard in shards for n in shard) == sorted(list(range(EXAMPLES)) * num_epochs)
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_processes_share_every_epoch_of_an_endless_stream():
  """Three batches over three processes are 12 consecutive positions of one stream."""
  loaders = [_loader(process_index=i, process_count=3, batch_size=4) for i in range(3)]
  stream = []
  for _ in range(EXAMPLES):
    together = np.stack([next(loader)['n'] for loader in loaders], axis=1)
    stream += list(together.ravel())
  for epoch in np.reshape(stream, (12, EXAMPLES)):
    assert sorted(epoch) == list(range(EXAMPLES))


def test_examples_do_not_depend_on_the_number_of_processes():
  """Order and random transforms follow the position over all processes."""
  alone = _take(_loader([Noise()], batch_size=12), 5)
  loaders = [_loader([Noise()], process_index=i, process_count=3) for i in range(3)]
  for batch in alone:
    parts = [next(loader) for loader in loaders]
    for name in ('n', 'noise'):
      together = np.stack([part[name] for part in parts], axis=1).ravel()
      np.testing.assert_array_equal(together, batch[name])


def test_random_transforms_differ_by_example_and_epoch():
  noise = [float(x) for batch in _take(_loader([Noise()]), EXAMPLES) for x in batch['noise']]
  assert len(set(noise)) == len(noise)


def test_evaluation_keeps_the_last_partial_batch_and_can_run_again():
  loader = _loader(num_epochs=1, shuffle=False)
  sizes = [len(batch['n']) for batch in loader]
  assert sizes == [4] * 7 + [3]
  assert loader.num_batches == 8
  assert _loader().num_batches is None
  assert _numbers(loader) == list(range(EXAMPLES))


@pytest.mark.parametrize('position', [0, 1, 5, 7, 8, 20])
@pytest.mark.parametrize('num_threads', [0, 2])
def test_resume_is_exact(position, num_threads):
  """Also inside an epoch, across its end, and while batches are being made ahead."""
  options = {'process_index': 1, 'process_count': 2, 'num_threads': num_threads}
  loader = _loader([Noise()], **options)
  _take(loader, position)
  state = json.loads(json.dumps(loader.get_state()))
  expected = _take(loader, 12)
  resumed = _loader([Noise()], **options)
  resumed.set_state(state)
  assert resumed.get_state() == state
  _assert_same(_take(resumed, 12), expected)
  loader.set_state(state)  # A loader that has gone on can be sent back as well.
  _assert_same(_take(loader, 12), expected)


def test_resume_of_images_is_exact(data_dir):
  source = open_source('openmoji', 'test', size=32, data_dir=data_dir)
  specs = [
    ('random_resized_crop', {'size': 16}),
    'random_flip',
    'choose_caption',
    'normalize',
  ]
  transforms = build_transforms(specs)
  loader = Loader(source, transforms, batch_size=50, seed=0)
  _take(loader, 6)
  state = loader.get_state()
  expected = _take(loader, 4)  # Across the end of the epoch of 381.
  resumed = Loader(source, transforms, batch_size=50, seed=0)
  resumed.set_state(state)
  again = _take(resumed, 4)
  _assert_same(again, expected)
  assert again[0]['image'].shape == (50, 16, 16, 3)
  assert again[0]['image'].dtype == np.float32
  assert isinstance(again[0]['caption'], list)


@pytest.mark.parametrize(
  ('change', 'name'),
  [
    ({'seed': 9}, 'seed=3'),
    ({'batch_size': 5}, 'batch_size=4'),
    ({'process_count': 2}, 'process_count=1'),
    ({'shuffle': False}, 'shuffle=True'),
  ],
)
def test_state_of_another_run(change, name):
  state = _loader().get_state()
  with pytest.raises(UserError, match=f'saved data state has {name}'):
    _loader(**change).set_state(state)


def test_state_of_another_source_or_none():
  state = Loader(_source(40), batch_size=4, seed=3).get_state()
  with pytest.raises(UserError, match='examples=40'):
    _loader().set_state(state)
  with pytest.raises(UserError, match='nothing'):
    _loader().set_state({})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 32}, '31 examples, fewer than one batch of 32'),
    ({'batch_size': 16, 'process_count': 2}, 'lower the batch size to 15'),
    ({'num_epochs': 1, 'process_count': 40}, 'use fewer processes'),
    ({'seed': -1}, 'seed -1'),
    ({'process_index': 1}, 'count from 0'),
    ({'batch_size': 0}, 'at least 1'),
  ],
)
def test_impossible_arguments(change, message):
  with pytest.raises(UserError, match=message):
    _loader(**change)


def test_an_error_in_a_record_reaches_the_caller():
  class Broken(ArraySource):
    def __getitem__(self, index):
      if index == 9:
        raise UserError('record 9 is broken')
      return super().__getitem__(index)

  loader = Loader(Broken({'n': np.arange(20)}), batch_size=4, seed=0, shuffle=False)
  assert _numbers(_take(loader, 2)) == list(range(8))
  with pytest.raises(UserError, match='record 9 is broken'):
    next(loader)


def test_ragged_images_name_the_remedy():
  source = ArraySource({'image': [np.zeros((2, 2, 3)), np.zeros((3, 2, 3))]})
  with pytest.raises(UserError, match='add resize and center_crop'):
    next(Loader(source, batch_size=2, seed=0))
