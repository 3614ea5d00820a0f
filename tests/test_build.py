"""One size of pictures in a config: another is refused before any data are read, or derived."""

import json

import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.config import parse
from diffusion_jax.formats.tensors import read_json
from diffusion_jax.recipe import load_config
from diffusion_jax.registry import TASKS, load
from tests import tiny, tiny_pipeline
from tests.train.tasks.test_classifier import classifier_config

TO_64 = {
  'resize': [['resize', {'size': 64}]],
  'crop': [['resize', {'size': 96}], ['center_crop', {'size': 64}]],
  'random_crop': [['random_crop', {'size': 64, 'padding': 32}]],
  'random_resized_crop': [['random_resized_crop', {'size': 64}]],
  'back': [['resize', {'size': 32}], ['random_flip', {}], ['resize', {'size': 64}]],
  'small': [['center_crop', {'size': 16}]],
}


@pytest.fixture
def refused(fails, tmp_path, monkeypatch):
  """refused(values): the sentence of train, which has neither read data nor written anything."""
  monkeypatch.setattr(build, 'open_sources', None)

  def run(values):
    config = tiny.write_config(tmp_path / 'recipe.py', values)
    sentence = fails('train', '--config', config, '--workdir', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    return sentence

  return run


@pytest.mark.parametrize('order', TO_64)
@pytest.mark.parametrize('task', ['autoencoder', 'classifier', 'clip', 'diffusion'])
def test_transforms_to_another_size_are_refused(task, order, refused, parts, tmp_path):
  size = tiny.SIZE
  values = {
    'autoencoder': tiny.autoencoder_config, 'clip': tiny.clip_config,
    'classifier': lambda: classifier_config(tmp_path),
    'diffusion': lambda: tiny.diffusion_config(parts, {'cache': False}),
  }[task]()
  if task == 'classifier':
    values['data']['size'] = size
    values['settings']['classifier'] = {**values['settings']['classifier'], 'image_size': size}
  rest = {'classifier': [['label', {}], *tiny.NORMALIZE]}.get(task, tiny.WITH_TEXT)
  values['data']['transforms'] = [*TO_64[order], *rest]
  edge = 16 if order == 'small' else 64
  sentence = refused(values)
  assert f'data.size is {size}, but data.transforms make pictures of {edge} x {edge}' in sentence
  assert f'({TO_64[order][-1][0]})' in sentence


@pytest.mark.parametrize(('make', 'settings', 'words'), [
  (tiny.clip_config, {'clip': {'vision_config': {'image_size': 64, 'patch_size': 16}}},
   'data.size is 32, but settings.clip.vision_config.image_size is 64'),
  (tiny.autoencoder_config, {'autoencoder': {'sample_size': 64, 'norm_num_groups': 2}},
   'data.size is 32, but settings.autoencoder.sample_size is 64'),
  (tiny.autoencoder_config, {'autoencoder': {
    'block_out_channels': [4] * 7, 'norm_num_groups': 2,
  }}, 'data.size is 32, but the autoencoder halves pictures to 1/64'),
])
def test_settings_of_another_size_are_refused(refused, make, settings, words):
  assert words in refused(make(settings))


def test_latents_of_another_size_are_refused(refused, parts):
  values = tiny.diffusion_config(parts)
  values['data']['size'] = 64
  assert 'data.size 64 gives latents of 16, but sample_size of the denoiser is 8' in refused(values)


def test_a_pipeline_of_another_size_is_refused(refused, tmp_path):
  tiny_pipeline.write_tiny_pipeline(tmp_path / 'model', tiny_pipeline.SD)
  values = load_config('finetune/lora').to_dict()
  values['settings'] |= {'model': str(tmp_path / 'model'), 'architecture': ''}
  sentence = refused(json.loads(json.dumps(values)))
  assert 'data.size is 512' in sentence and 'set data.size to 16.' in sentence


@pytest.mark.parametrize('name', ['random_flip', 'random_crop', 'random_resized_crop'])
def test_edges_that_the_picture_would_leave_are_refused(name, refused, tmp_path):
  tiny_pipeline.write_tiny_pipeline(tmp_path / 'model', tiny_pipeline.SD)
  values = load_config('finetune/controlnet').to_dict()
  values['settings'] |= {'model': str(tmp_path / 'model'), 'architecture': ''}
  values['data'] |= {'size': 16, 'transforms': ['edges', name, *tiny.WITH_TEXT]}
  assert f'edges before {name}' in refused(json.loads(json.dumps(values)))


@pytest.mark.parametrize('recipe', ['autoencoder', 'clip', 'classifier'])
@pytest.mark.parametrize('size', [32, 128])
def test_the_size_of_a_recipe_is_changed_in_one_place(recipe, size):
  more = {
    'autoencoder': [], 'clip': ['settings.clip.vision_config.image_size'],
    'classifier': ['settings.classifier.image_size'],
  }[recipe]
  config = parse(load_config(f'openmoji/{recipe}', [
    f'--config.{key}={size}' for key in ('data.size', *more)
  ]))
  load(TASKS, config.task).check(config)


def test_transforms_without_a_size_take_that_of_the_data(small_data, tmp_path):
  values = tiny.autoencoder_config({'adversarial_weight': 0.0})
  values['data']['transforms'] = [['random_resized_crop', {}], *tiny.NORMALIZE]
  with tiny.few_devices():
    batch = next(build.build(values, str(tmp_path)).loader)
  assert np.shape(batch['image']) == (8, 32, 32, 3)


def test_an_autoencoder_states_the_size_that_it_was_trained_at(trained):
  workdir = trained('autoencoder')
  assert '32 x 32 pixels' in (workdir / 'README.md').read_text()
  assert read_json(workdir / 'model' / 'config.json')['sample_size'] == 32
