"""data.size as one number or two, from the command line to the checks before any work."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffusion_jax.config import parse
from diffusion_jax.errors import UserError
from diffusion_jax.models.mmdit import MMDiTConfig
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.recipe import load_config
from diffusion_jax.registry import TASKS, load
from diffusion_jax.train.tasks.finetune import FinetuneTask
from diffusion_jax.train.tasks.trainable import Full
from tests import tiny_pipeline


def finetuned(folder, size):
  overrides = [f'--config.settings.model={folder}', f'--config.data.size={size}']
  return parse(load_config('finetune/sd15', overrides))


def test_fine_tuning_takes_a_height_and_a_width_that_the_model_halves(tmp_path):
  tiny_pipeline.write_tiny_pipeline(tmp_path, tiny_pipeline.SD)
  config = finetuned(tmp_path, '(24,16)')
  assert config.data.shape == (24, 16) and config.data.edge == 24
  FinetuneTask.check_size(config)
  FinetuneTask.check_size(finetuned(tmp_path, tiny_pipeline.SIZE))
  with pytest.raises(UserError, match=r'multiples of 2; the nearest such size is \(24, 16\)'):
    FinetuneTask.check_size(finetuned(tmp_path, '(24,17)'))
  with pytest.raises(UserError, match=r'set data\.size to 16'):
    FinetuneTask.check_size(finetuned(tmp_path, 24))


def test_a_fine_tuned_unet_is_exported_with_the_size_it_was_trained_at(tmp_path):
  """Which is all that changes; a transformer's positions depend on its own, which stays."""
  diffusers = pytest.importorskip('diffusers')
  tiny_pipeline.write_tiny_pipeline(tmp_path / 'old', tiny_pipeline.SD)
  model, weights, _ = load_model(str(tmp_path / 'old'))
  for size, told in (((24, 16), [12, 8]), ((20, 20), 10), ((16, 16), 8)):
    trainable = Full(finetuned(tmp_path / 'old', size).settings)
    trainable.adapted(dataclasses.replace(model, size=size))
    folder = tmp_path / str(told)
    trainable.export(folder, weights[DENOISER], 'float32')
    again, found, _ = load_model(str(folder))
    assert again.trained_size == size
    assert json.loads((folder / 'unet' / 'config.json').read_text())['sample_size'] == told
    jax.tree.map(np.testing.assert_array_equal, found, weights)
  assert dataclasses.replace(again.denoiser.config, sample_size=8) == model.denoiser.config
  opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / '[12, 8]' / 'unet')
  assert list(opened.config.sample_size) == [12, 8]
  with pytest.raises(UserError, match=r'set data\.size to \(24, 16\)'):
    FinetuneTask.check_size(finetuned(tmp_path / '[12, 8]', 24))
  assert not hasattr(MMDiTConfig(), 'trained_at')


@pytest.mark.parametrize('size', ['(0,16)', '(16,9000)', '(16,)', '(16,8,8)'])
def test_sizes_that_are_none(size, tmp_path):
  with pytest.raises(UserError, match=r'data\.size'):
    finetuned(tmp_path, size)


@pytest.mark.parametrize(('recipe', 'size', 'says'), [
  ('toy/edm', '(48,64)', 'task toy takes no pictures; give one number'),
  ('openmoji/t5', '(48,64)', 'task t5 takes no pictures; give one number'),
  ('openmoji/clip', '(48,64)', 'image_size is 64, the edge of squares'),
  ('openmoji/classifier', '(48,64)', 'image_size is 64, the edge of squares'),
  ('openmoji/autoencoder', '(48,50)', r'multiples of 4; the nearest such size is \(48, 48\)'),
  ('openmoji/autoencoder', '65', 'a multiple of 4, the nearest is 64'),
  ('openmoji/dit_flow', '(48,50)', r'multiples of 8; the nearest such size is \(48, 48\)'),
  ('openmoji/dit_flow', '65', 'set data.size to 64'),
  *((name, '(64,64)', '') for name in ('openmoji/clip', 'openmoji/classifier')),
  *((f'openmoji/{name}', '(48,64)', '') for name in ('autoencoder', 'quickstart', 'mmdit')),
])
def test_every_task_takes_a_height_and_a_width_or_says_why_not(recipe, size, says):
  config = parse(load_config(recipe, [f'--config.data.size={size}']))
  check = lambda: load(TASKS, config.task).check(config)
  if not says:
    return check()
  with pytest.raises(UserError, match=says):
    check()


def test_a_network_that_cannot_halve_its_own_latents_is_refused():
  sizes = ['--config.data.size=72', '--config.settings.unet.sample_size=9']
  config = parse(load_config('openmoji/quickstart', sizes))
  with pytest.raises(UserError, match='nearest such size'):
    load(TASKS, config.task).check(config)
