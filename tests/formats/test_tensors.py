"""Safetensors, lazily: exactness, damage, memory. Libraries' own files: tests/parity."""

import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.formats.tensors import (
  Tensor,
  metadata,
  open_tensors,
  write_json,
  write_tensors,
)

RNG = np.random.default_rng(0)
TENSORS = {
  'a': RNG.normal(size=(3, 5)).astype(np.float32), 'half': RNG.normal(size=7).astype(np.float16),
  'scalar': np.array(2.5, np.float32), 'empty': np.zeros((0, 4), np.float32),
  'ids': np.arange(6).reshape(1, 6), 'byte': np.array([1, 2, 3], np.uint8),
}


def arrays(path):
  return {name: np.array(tensor) for name, tensor in open_tensors(path).items()}


def test_the_library_reads_what_we_write_and_the_reverse(tmp_path):
  write_tensors(tmp_path / 'ours', TENSORS, {'note': 'x'})
  save_file(TENSORS, tmp_path / 'theirs')
  for path in (tmp_path / 'ours', tmp_path / 'theirs'):
    for found in (load_file(path), arrays(path)):
      assert found.keys() == TENSORS.keys()
      for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)
  assert metadata(tmp_path / 'ours') == {'format': 'pt', 'note': 'x'}


def test_bfloat16_and_float8_keep_their_bits(tmp_path):
  values = {'b': RNG.normal(size=9).astype(ml_dtypes.bfloat16),
            'e': RNG.normal(size=9).astype(ml_dtypes.float8_e4m3fn)}
  write_tensors(tmp_path / 'x', values)
  found = arrays(tmp_path / 'x')
  assert all(found[n].tobytes() == v.tobytes() and found[n].dtype == v.dtype
             for n, v in values.items())
  with safe_open(tmp_path / 'x', 'flax') as file:
    assert file.get_tensor('b').tobytes() == values['b'].tobytes()


def header(entries, data=b'', length=None):
  text = json.dumps(entries).encode()
  return struct.pack('<Q', len(text) if length is None else length) + text + data


F32 = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


@pytest.mark.parametrize('content', [
  b'', b'\x01', struct.pack('<Q', 2**63) + b'{}', header({'a': F32}, b'x' * 8, length=10**12),
  header({'a': F32}, b'x' * 7), header({'a': F32}, b'x' * 9),
  header({'a': F32 | {'shape': [3]}}, b'x' * 8),
  header({'a': F32 | {'shape': [2**62, 4]}}, b'x' * 8),
  header({'a': F32 | {'data_offsets': [8, 0]}}, b'x' * 8),
  header({'a': F32 | {'data_offsets': [-8, 0]}}, b'x' * 8),
  header({'a': F32, 'b': F32}, b'x' * 8),
  header({'a': F32 | {'dtype': 'EVIL'}}, b'x' * 8), header([1, 2]), b'\x80\x04\x95pickle' * 9,
], ids=str)
def test_damaged_and_malicious_files_are_refused(tmp_path, content):
  (tmp_path / 'x.safetensors').write_bytes(content)
  with pytest.raises(UserError, match=r'x\.safetensors is not a whole safetensors file'):
    open_tensors(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('suffix', ['.bin', '.ckpt', '.pt', '.pth', '.pkl'])
def test_pickles_are_never_opened(tmp_path, suffix):
  (tmp_path / f'x{suffix}').write_bytes(b'')
  with pytest.raises(UserError, match='never opened'):
    open_tensors(tmp_path / f'x{suffix}')


def sharded(folder, table):
  for name in ('one', 'two'):
    write_tensors(folder / name, {f'{name}.weight': np.ones(3, np.float32)})
  write_json(folder / 'm.safetensors.index.json', {'weight_map': table})
  return folder / 'm.safetensors.index.json'


def test_shards_are_one_table(tmp_path):
  index = sharded(tmp_path, {'one.weight': 'one', 'two.weight': 'two'})
  assert arrays(index).keys() == {'one.weight', 'two.weight'}


@pytest.mark.parametrize(('table', 'words'), [
  ({'one.weight': 'two'}, 'says that two holds one.weight'),
  ({'one.weight': '../one'}, 'weight_map'), ({'one.weight': '/etc/passwd'}, 'weight_map'),
  ({'one.weight': 3}, 'weight_map'), (None, 'weight_map'), ({'x': 'three'}, 'no file .*three'),
])
def test_a_bad_index_is_refused(tmp_path, table, words):
  with pytest.raises(UserError, match=words):
    open_tensors(sharded(tmp_path, table))


def test_writing_makes_one_tensor_at_a_time(tmp_path):
  made = []

  def make(i):
    # The one before may still be at hand while the next is made, none earlier.
    assert all(old() is None for old in made[:-1])
    array = np.full(4, i, np.float32)
    made.append(weakref.ref(array))
    return array

  new = {f'{i}': Tensor(np.dtype(np.float32), (4,), lambda i=i: make(i)) for i in range(5)}
  assert made == []
  write_tensors(tmp_path / 'x', new)
  assert len(made) == 5
  assert all((v == int(n)).all() for n, v in arrays(tmp_path / 'x').items())


def test_a_failed_write_leaves_the_old_file(tmp_path):
  write_tensors(tmp_path / 'x', TENSORS)
  before = (tmp_path / 'x').read_bytes()
  for broken in (lambda: 1 / 0, lambda: np.zeros(3, np.float32), lambda: np.zeros(4)):
    with pytest.raises((ZeroDivisionError, ValueError)):
      write_tensors(tmp_path / 'x', {'a': Tensor(np.dtype(np.float32), (4,), broken)})
  assert (tmp_path / 'x').read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['x']
