"""Records that cannot be read: what takes their place, and when there are too many."""

import itertools
import json

import numpy as np
import pytest

from diffusion_jax.data.loader import Loader
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.sources.folder import Alternating
from diffusion_jax.data.unreadable import Counted, Damage, first_readable, readable
from diffusion_jax.errors import Unreadable, UserError

EXAMPLES, BAD = 31, {3, 4, 5, 17}


class Noise:
  """A random transform whose draw shows in the batch."""

  random = True

  def __call__(self, record, rng):
    return record | {'noise': rng.random()}


def source(bad=BAD, examples=EXAMPLES):
  return ArraySource({'n': np.arange(examples)}, {i: f'record {i} is cut.' for i in bad})


def counted(bad=BAD, most=0.5, examples=EXAMPLES):
  said = []
  return Counted(source(bad, examples), most, Damage(said.append), 'training records'), said


def loader(records, **changes):
  return Loader(records, [Noise()], **{'batch_size': 4, 'seed': 3, **changes})


def take(batches, count):
  return {
    name: np.concatenate([batch[name] for batch in taken])
    for taken in [list(itertools.islice(batches, count))] for name in ('n', 'noise')
  }


def assert_same(a, b):
  for name in ('n', 'noise'):
    np.testing.assert_array_equal(a[name], b[name])


def test_others_take_the_place_of_what_cannot_be_read_and_nothing_else_changes():
  whole, found = take(loader(source(())), 4 * EXAMPLES), take(loader(source()), 4 * EXAMPLES)
  good = ~np.isin(whole['n'], list(BAD))
  for name in ('n', 'noise'):
    np.testing.assert_array_equal(found[name][good], whole[name][good])
  assert not set(found['n']) & BAD
  stand_ins = found['n'][~good]
  assert len(stand_ins) == 16 * len(BAD)
  assert len(set(stand_ins)) > 12  # By position, so that no one record counts for two.


@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('threads', [0, 3])
def test_batches_do_not_depend_on_processes_threads_and_starts(processes, threads):
  """Nor on what a process has come upon before."""
  expected = take(loader(source(), batch_size=12, num_threads=1), 15)
  shares = np.split(np.arange(12), processes)
  parts = []
  for rows in shares:
    first = loader(counted()[0], batch_size=12, rows=rows, num_threads=threads)
    early = take(first, 7)
    second = loader(counted()[0], batch_size=12, rows=rows, num_threads=threads)
    second.set_state(json.loads(json.dumps(first.get_state())))
    late = take(second, 8)
    both = {name: np.concatenate([early[name], late[name]]) for name in early}
    parts.append({name: column.reshape(15, -1) for name, column in both.items()})
  found = {name: np.concatenate([p[name] for p in parts], axis=1).ravel() for name in parts[0]}
  assert_same(found, expected)


def test_each_is_said_once_and_tried_once():
  records, said = counted()
  tried = []
  inner = records.source

  class Watched(ArraySource):
    def __getitem__(self, index):
      tried.append(int(index))
      return inner[index]

  records.source = Watched({'n': np.arange(EXAMPLES)})
  take(loader(records), 4 * EXAMPLES)
  assert sorted(said) == sorted(f'record {i} is cut.' for i in BAD)
  assert all(tried.count(i) == 1 for i in BAD)
  damage = Damage()
  for _ in range(2):  # Two splits may share pictures.
    list(readable(Counted(source(), 0.5, damage, 'records')))
  assert sorted(damage.sentences) == sorted(said) and len(damage) == 4


@pytest.mark.parametrize(('most', 'ends'), [(4 / 31, False), (3.9 / 31, True), (0, True)])
def test_more_than_the_share_ends_with_a_sentence_that_names_some(most, ends):
  records, _ = counted(most=most)
  batches = loader(records, num_threads=0)
  if not ends:
    take(batches, 20)
    return
  for _ in range(2):  # And again, whoever asks.
    with pytest.raises(UserError) as error:
      take(batches, 20)
  assert not isinstance(error.value, Unreadable)
  number = 4 if most else 1
  assert str(error.value).startswith(
    f'{number} of 31 training records cannot be read, more than the fraction of {most:g} that '
    'data.most_unreadable allows: record '
  )


@pytest.mark.parametrize(('wrap', 'most'), [(False, 1), (True, 1), (True, 0.5)])
@pytest.mark.parametrize('threads', [0, 2])
def test_nothing_to_read_ends_with_a_sentence(wrap, most, threads):
  every = range(5000)
  records = counted(every, most, 5000)[0] if wrap else source(every, 5000)
  with pytest.raises(UserError, match=r'cannot be read.* record \d+ is cut') as error:
    next(loader(records, num_threads=threads))
  assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_the_only_one_that_is_left_is_found():
  found = take(loader(source(set(range(997)) - {500}, 997), num_threads=0), 3)
  assert set(found['n']) == {500}


def test_a_subject_is_replaced_by_the_subject():
  """Or the mean over both sources would no longer be the sum of their means."""
  subject = ArraySource({'n': np.arange(4)}, {1: 'cut', 2: 'cut'})
  both = Alternating(subject, ArraySource({'n': 100 + np.arange(8)}, {5: 'cut'}), 0.25)
  found = next(loader(both, batch_size=16, num_threads=0))
  assert np.isin(found['n'], [0, 3]).sum() == 8
  assert (found['weight'][found['n'] < 100] == 2).all()


def test_an_error_of_another_kind_is_raised():
  class Wrong(ArraySource):
    def __getitem__(self, index):
      raise UserError('the config is wrong.')

  with pytest.raises(UserError, match='the config is wrong'):
    next(loader(Wrong({'n': np.arange(8)})))


def test_what_is_fixed_leaves_them_out():
  assert [record['n'] for record in readable(source())] == sorted(set(range(31)) - BAD)
  assert [record['n'] for record in first_readable(source(), 5)] == [0, 1, 2, 6, 7]
  assert [record['n'] for record in first_readable(source(), 2, [4, 17, 9, 8, 1])] == [9, 8]
  assert len(first_readable(source(), 99)) == EXAMPLES - len(BAD)
  for empty in (source(range(EXAMPLES)), ArraySource({'n': np.arange(0)})):
    with pytest.raises(UserError, match='choose another data set'):
      first_readable(empty, 2)


def test_a_counted_source_is_the_source_otherwise():
  records, _ = counted()
  records.source.labels = ['a']
  assert records.labels == ['a'] and len(records) == EXAMPLES and records[-1]['n'] == 30
  assert not hasattr(records, 'nothing')
  with pytest.raises(IndexError):
    records[EXAMPLES]
