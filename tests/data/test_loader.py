"""The loader: every example once, anew each epoch, and the same again after a restart."""

import json
import time

import numpy as np
import pytest

from diffusion_jax.data.loader import Loader
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.sources.tfds import open_source
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


def _shares(processes, batch_size=12):
  """Rows of a batch that each of so many processes might hold; the last case overlaps."""
  rows = np.arange(batch_size)
  return {
    'blocks': np.split(rows, processes),
    'interleaved': [rows[i::processes] for i in range(processes)],
    'the same': [rows] * processes,
  }


@pytest.mark.parametrize('kind', ['blocks', 'interleaved', 'the same'])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(processes, kind):
  """Order and random transforms follow the position in the one stream, over five epochs."""
  alone = _take(_loader([Noise()], batch_size=12), 13)
  shares = _shares(processes)[kind]
  loaders = [_loader([Noise()], batch_size=12, rows=rows) for rows in shares]
  for batch in alone:
    for rows, part in zip(shares, map(next, loaders), strict=True):
      for name in ('n', 'noise'):
        np.testing.assert_array_equal(part[name], batch[name][rows])


def test_a_process_reads_its_own_rows_and_no_others():
  read = []

  class Counted(ArraySource):
    def __getitem__(self, index):
      read.append(int(index))
      return super().__getitem__(index)

  source = Counted({'n': np.arange(24)})
  loader = Loader(
    source, batch_size=8, rows=np.array([1, 2, 5]), seed=0, shuffle=False, num_threads=0
  )
  assert _numbers(_take(loader, 3)) == read == [1, 2, 5, 9, 10, 13, 17, 18, 21]


@pytest.mark.parametrize('rows', [[], [4], [-1]])
def test_rows_outside_a_batch(rows):
  with pytest.raises(ValueError, match='not rows of a batch of 4'):
    _loader(rows=np.array(rows, int))


def test_random_transforms_differ_by_example_and_epoch():
  noise = [float(x) for batch in _take(_loader([Noise()]), EXAMPLES) for x in batch['noise']]
  assert len(set(noise)) == len(noise)


@pytest.mark.parametrize('position', [0, 1, 5, 7, 8, 20])
@pytest.mark.parametrize(('threads', 'later'), [(0, 2), (2, 2), (2, 5), (3, 0)])
def test_resume_is_exact(position, threads, later):
  """Also inside an epoch, across its end, with batches made ahead, and by another many threads."""
  options = {'rows': np.array([1, 3])}
  loader = _loader([Noise()], num_threads=threads, **options)
  _take(loader, position)
  state = json.loads(json.dumps(loader.get_state()))
  expected = _take(loader, 12)
  resumed = _loader([Noise()], num_threads=later, **options)
  resumed.set_state(state)
  assert resumed.get_state() == state
  _assert_same(_take(resumed, 12), expected)
  loader.set_state(state)  # A loader that has gone on can be sent back as well.
  _assert_same(_take(loader, 12), expected)


def test_an_epoch_over_three_starts_with_other_processes_and_threads():
  """4 processes, then 1, then 2: no example twice or never, and bitwise the same batches."""
  expected = _take(_loader([Noise()], batch_size=12), EXAMPLES)
  found, state = [], None
  for processes, threads, batches in ((4, 2, 9), (1, 5, 4), (2, 0, EXAMPLES - 13)):
    shares = _shares(processes)['blocks']
    loaders = [
      _loader([Noise()], batch_size=12, rows=rows, num_threads=threads) for rows in shares
    ]
    for loader in loaders:
      if state is not None:
        loader.set_state(state)
    for _ in range(batches):
      parts = [next(loader) for loader in loaders]
      found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    state, *others = [json.loads(json.dumps(loader.get_state())) for loader in loaders]
    assert all(other == state for other in others)
  _assert_same(found, expected)
  for epoch in np.reshape(_numbers(found), (12, EXAMPLES)):
    assert sorted(epoch) == list(range(EXAMPLES))


def test_going_to_a_far_position_reads_nothing():
  class Unreadable(ArraySource):
    def __getitem__(self, index):
      raise AssertionError('read')

  loader = Loader(Unreadable({'n': np.arange(8)}), batch_size=8, seed=0)
  state = loader.get_state() | {'position': 10**12}
  loader.set_state(state)
  assert loader.get_state() == state


@pytest.mark.parametrize(('threads', 'ahead'), [(2, 4), (0, 0)])
def test_batches_are_made_while_one_is_used(threads, ahead):
  read = []

  class Slow(Noise):
    def __call__(self, record, rng):
      read.append(record['n'])
      return super().__call__(record, rng)

  loader = _loader([Slow()], num_threads=threads, prefetch=4)
  next(loader)
  end = time.monotonic() + 10
  while len(read) < 4 * (1 + ahead) and time.monotonic() < end:
    time.sleep(0.01)
  assert len(read) >= 4 * (1 + ahead) if threads else len(read) == 4


def test_the_spec_is_of_a_global_batch_and_moves_nothing():
  """Types are those that an array has on the device."""
  loader = _loader([Noise()], rows=np.array([2]))
  spec = loader.spec()
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in spec.items()} == {
    'n': ((4,), np.int32), 'noise': ((4,), np.float32),
  }
  _assert_same(_take(loader, 3), _take(_loader([Noise()], rows=np.array([2])), 3))


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
  state = _loader().get_state()
  with pytest.raises(UserError, match='no position'):
    _loader().set_state(state | {'position': {'next_index': 3}})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 32}, '31 examples, fewer than one batch of 32'),
    ({'batch_size': 40}, 'lower the batch size to 31'),
    ({'seed': -1}, 'seed is -1'),
    ({'num_threads': -1}, '-1 data threads'),
    ({'batch_size': 0}, 'at least 1'),
  ],
)
def test_impossible_arguments(change, message):
  with pytest.raises(UserError, match=message):
    _loader(**change)


@pytest.mark.parametrize('num_threads', [0, 2])
def test_an_error_in_a_record_reaches_the_caller_and_skips_nothing(num_threads):
  broken = True

  class Broken(ArraySource):
    def __getitem__(self, index):
      if index == 9 and broken:
        raise UserError('record 9 is broken')
      return super().__getitem__(index)

  source = Broken({'n': np.arange(20)})
  loader = Loader(source, batch_size=4, seed=0, shuffle=False, num_threads=num_threads)
  assert _numbers(_take(loader, 2)) == list(range(8))
  for _ in range(2):
    with pytest.raises(UserError, match='record 9 is broken'):
      next(loader)
  assert loader.get_state()['position'] == 2
  broken = False
  assert _numbers(_take(loader, 2)) == list(range(8, 16))


def test_ragged_images_name_the_remedy():
  source = ArraySource({'image': [np.zeros((2, 2, 3)), np.zeros((3, 2, 3))]})
  with pytest.raises(UserError, match='add resize and center_crop'):
    next(Loader(source, batch_size=2, seed=0))
