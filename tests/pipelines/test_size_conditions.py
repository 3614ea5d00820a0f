"""Sizes that Stable Diffusion XL and its refiner are conditioned on."""

import dataclasses

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.unet import UNETS
from diffusion_jax.pipelines.conditioners import Request
from diffusion_jax.pipelines.options import SampleOptions
from diffusion_jax.pipelines.size_conditions import REFINER, Sizes, check_sizing

BASE, EXPERT = Sizes.of(UNETS['sdxl'], 1280), Sizes.of(UNETS['sdxl_refiner'], 1280)


def test_numbers_of_a_request():
  """As drawn, where nothing is said; crop and score are of the prompt alone in a refiner."""
  rows = lambda one, **told: one.rows(
    Request(['a', 'b'], height=96, width=64, sizing=SampleOptions(**told).sizing)
  )
  told = {'original_size': '200x100', 'crop': (3, 5)}
  for more, wanted in (
    ({}, [96, 64, 0, 0, 96, 64]), (told, [200, 100, 3, 5, 96, 64]),
    ({'target_size': '512'}, [96, 64, 0, 0, 512, 512]),
  ):
    found = rows(BASE, **more)
    np.testing.assert_array_equal(found['sizes'], [wanted] * 2)
    assert BASE.same(found)
  found = rows(EXPERT, **told, aesthetic_score=7.0)
  np.testing.assert_array_equal(found['sizes'], [[200, 100, 3, 5, 7]] * 2)
  np.testing.assert_array_equal(found['negative_sizes'], [[200, 100, 0, 0, 2.5]] * 2)
  assert not EXPERT.same(found)


def test_numbers_in_training():
  np.testing.assert_array_equal(BASE.of_size(1, 9, 7)['sizes'], [[9, 7, 0, 0, 9, 7]])
  np.testing.assert_array_equal(EXPERT.of_size(1, 9, 7)['sizes'], [[9, 7, 0, 0, 6]])
  batch = {'sizes': np.array([[20, 30, 1, 2, 9, 7]], np.float32)}
  np.testing.assert_array_equal(BASE.of_batch({}, batch)['sizes'], batch['sizes'])
  np.testing.assert_array_equal(EXPERT.of_batch({}, batch)['sizes'], [[20, 30, 1, 2, 6]])


def test_what_a_denoiser_is_not_made_for():
  config = UNETS['sdxl']
  assert Sizes.of(config, 1280 + 256).reads == REFINER
  for changes, pooled in (({}, 1281), ({}, 1280 + 512), ({'addition_time_embed_dim': 300}, 1280)):
    with pytest.raises(UserError, match='projection_class_embeddings_input_dim is 2816'):
      Sizes.of(dataclasses.replace(config, **changes), pooled)
  with pytest.raises(UserError, match='sizes takes no options'):
    Sizes.build({'reads': ()}, None)


@pytest.mark.parametrize(('options', 'sizes'), [
  ({'crop': (1, 0)}, None), ({'aesthetic_score': 5.0}, BASE), ({'target_size': '8'}, EXPERT),
  ({'original_size': '8x9'}, Sizes.of(object(), 0)),
])
def test_what_has_no_effect_is_refused(options, sizes):
  [(name, _)] = options.items()
  check_sizing(SampleOptions(), sizes)
  with pytest.raises(UserError, match=f'{name} is .*, but the model is not conditioned on it'):
    check_sizing(SampleOptions(**options), sizes)


@pytest.mark.parametrize(('options', 'says'), [
  ({'original_size': '0x9'}, 'original_size'), ({'target_size': 'wide'}, 'target_size'),
  ({'denoising_start': 0.6, 'denoising_end': 0.5}, 'denoising_start is 0.6'),
])
def test_what_is_no_size(options, says):
  with pytest.raises(UserError, match=says):
    SampleOptions(**options)
