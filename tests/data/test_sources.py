"""Random access to records and to columns."""

import pickle

import numpy as np
import pytest

from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.sources.tfds import open_source
from diffusion_jax.errors import UserError


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


def test_columns():
  source = ArraySource({'latents': np.arange(12.0).reshape(3, 4), 'id': ['a', 'b', 'c']})
  assert len(source) == 3
  np.testing.assert_array_equal(source[1]['latents'], [4, 5, 6, 7])
  assert source[-1]['id'] == 'c'
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize('columns', [{}, {'a': [1, 2], 'b': [1]}])
def test_columns_of_different_lengths(columns):
  with pytest.raises(UserError, match='common length'):
    ArraySource(columns)
