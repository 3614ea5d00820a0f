"""Lists of sizes of pictures, by name, made, or given."""

import ast
import math

import pytest

from diffusion_jax.config import DataConfig, typed, untyped
from diffusion_jax.errors import UserError
from diffusion_jax.recipe import load_config
from diffusion_jax.sizes import SDXL, made_shapes, nearest_to_square, spread


def _data(size, **more):
  return typed(DataConfig, {'dataset': 'folder:x', 'size': size, **more}, 'data.')


@pytest.mark.parametrize(('size', 'shapes', 'square'), [
  (32, ((32, 32),), (32, 32)),
  ([32, 48], ((32, 48),), (32, 48)),
  ([[32, 48], [48, 32], [40, 44]], ((32, 48), (48, 32), (40, 44)), (40, 44)),
  ([[32, 48], [48, 32]], ((32, 48), (48, 32)), (32, 48)),
  ({'buckets': 'sdxl'}, SDXL, (1024, 1024)),
  ({'area': 4096, 'step': 16}, ((48, 80), (64, 64), (80, 48)), (64, 64)),
  ({'area': 4096, 'step': 16, 'ratio': 4, 'most': 3}, ((32, 128), (64, 64), (128, 32)), (64, 64)),
])
def test_what_data_size_may_be(size, shapes, square):
  config = _data(size)
  assert config.shapes == shapes and config.shape == square
  assert typed(DataConfig, untyped(config)) == config


@pytest.mark.parametrize(('size', 'message'), [
  ([], 'give height and width'), ([[16, 16], [0, 2]], 'give height and width'),
  ([[16, 16], [16, 16]], 'the same height and width twice'),
  ([[16, 16], 16], 'it must be int'), (True, 'it must be int'),
  ({'buckets': 'sdx'}, 'did you mean sdxl'), ({}, 'neither buckets nor area'),
  ({'buckets': 'sdxl', 'step': 32}, 'data.size.step has no effect'),
  ({'area': 10}, 'give the pixels of sizes'), ({'area': 4096, 'ratio': 0.5}, 'at least 1'),
  ({'area': 2**40, 'step': 1}, 'give the pixels of sizes'), ({'aera': 3}, 'did you mean'),
  ({'area': 2**20, 'step': 8, 'most': 60}, 'gives 60 sizes, .*data.most_buckets is 40'),
])
def test_what_it_may_not_be(size, message):
  with pytest.raises(UserError, match=message):
    _data(size)


def test_the_number_of_sizes_is_bounded_by_a_key():
  assert len(_data({'area': 2**20, 'step': 8, 'most': 60}, most_buckets=60).shapes) == 60
  with pytest.raises(UserError, match=r'data\.most_buckets is 2;'):
    _data([[8, 8], [8, 16], [16, 8]], most_buckets=2)


def test_made_sizes_fill_the_area_and_are_alike_on_their_sides():
  shapes = made_shapes(1024**2, 64, 2.0)
  assert set(shapes) <= set(SDXL) and len(shapes) == 13
  for height, width in shapes:
    assert height % 64 == width % 64 == 0 and (width, height) in shapes
    assert 0.9 * 1024**2 < height * width <= 1024**2
    assert max(height, width) <= 2 * min(height, width)
  assert len(SDXL) == len(set(SDXL)) == 40 and nearest_to_square(SDXL) == (1024, 1024)


@pytest.mark.parametrize('most', [1, 2, 3, 7, 12])
def test_fewer_sizes_keep_the_square_and_the_widest(most):
  shapes = made_shapes(1024**2, 64, 2.0)
  found = spread(shapes, most)
  assert len(found) == most and (1024, 1024) in found and set(found) <= set(shapes)
  if most > 2:
    assert {shapes[0], shapes[-1]} <= set(found)
    logs = [math.log(height / width) for height, width in found]
    assert logs == sorted(logs)


@pytest.mark.parametrize('size', ['64', '(16,32)', '((16,24),(16,20))', "{'area':256,'step':4}"])
def test_any_size_takes_the_place_of_any_other_on_the_command_line(size, tmp_path):
  file = tmp_path / 'recipe.py'
  for before in ('32', '(8, 16)', '((8, 16), (16, 8))', '[[8, 16], [16, 8]]', "{'area': 64}"):
    file.write_text(
      'from ml_collections import ConfigDict\n\n\ndef get_config():\n'
      f"  return ConfigDict({{'data': {{'size': {before}}}}})\n"
    )
    found = load_config(str(file), [f'--config.data.size={size}']).to_dict()
    assert found == {'data': {'size': ast.literal_eval(size)}}
