"""Pipelines of diffusers, trained at a tiny size, exported and opened there again."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion_jax.formats.tensors import metadata
from diffusion_jax.pipelines.adapters import add_lora
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.pipelines.model import DENOISER
from diffusion_jax.run import TrainedRun
from tests import tiny_pipeline
from tests.parity import small_pipelines as small
from tests.parity import test_parity_pixart_pipelines as pixart
from tests.parity.test_parity_transformer_pipelines import (
  PROMPTS,
  assert_same,
  draw,
  draw_theirs,
  state,
)
from tests.train.conftest import RECIPES, SMALL

peft = pytest.importorskip('peft')
SIZE = small.SIZE, small.SIZE


@pytest.fixture(scope='module')
def trained(tmp_path_factory, command):
  """trained(recipe, name): (their pipeline, its folder, the workdir of a run of two steps)."""

  def run(recipe, name, **changes):
    folder = tmp_path_factory.mktemp(recipe)
    theirs = small.make(name)
    theirs.save_pretrained(folder / name)
    tiny_pipeline.write_pictures(folder / 'pictures')
    values = SMALL | {
      'settings.model': folder / name, 'data.dataset': f'folder:{folder / "pictures"}',
      'data.size': SIZE, 'settings.preview_captions': "('cab',)", 'mesh.data': 1, 'mesh.fsdp': 1,
      'settings.sample.sampler': 'flow_euler', 'loop.total_steps': 2,
      'settings.caption_dropout': 0.0, **changes,
    }
    more = [f'--config.{key}={value}' for key, value in values.items()]
    config = str(RECIPES / f'{recipe}.py')
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet', *more) == 0
    return theirs, folder / name, folder / 'run' / 'model'

  return run


def test_stable_diffusion_3(trained):
  theirs, _, made = trained('sd35_medium', 'sd35')
  new, old = state(type(theirs).from_pretrained(made)), state(theirs)
  same = {key for key in old if torch.equal(new[key], old[key])}
  assert {key for key in old if not key.startswith('transformer.')} <= same
  assert 'transformer.pos_embed.pos_embed' in same
  # Published weights that no result depends on, and the table of positions.
  assert {key for key in same if key.startswith('transformer.')} <= {
    'transformer.pos_embed.pos_embed',
    *(key for key in old if '.1.attn.add_q_proj' in key or '.1.attn.norm_added_q' in key),
  }
  _, weights, _ = load_model(str(made))
  kernel = weights[DENOISER]['proj_out.kernel']
  np.testing.assert_array_equal(kernel, new['transformer.proj_out.weight'].numpy().T)


def test_pixart(trained):
  """But for the variance, which no loss is of, and what is added to all keys of a query."""
  theirs, _, made = trained(
    'pixart', 'pixart_sigma', **{'settings.sample.sampler': 'dpmpp_2m', 'dtype': 'float32'}
  )
  new, old = state(type(theirs).from_pretrained(made)), state(theirs)
  same = {key for key in old if torch.equal(new[key], old[key])}
  assert {key for key in old if not key.startswith('transformer.')} <= same
  assert all(key.endswith('to_k.bias') for key in same if key.startswith('transformer.'))


def test_the_refiner(trained):
  """Told sizes and its score: all of its U-Net, and nothing else, is another."""
  theirs, _, made = trained('sdxl', 'refiner', **{'settings.sample.sampler': 'ddim'})
  new, old = state(type(theirs).from_pretrained(made)), state(theirs)
  assert new.keys() == old.keys()
  changed = {key for key in old if not torch.equal(new[key], old[key])}
  assert {key.partition('.')[0] for key in changed} == {'unet'}
  assert 'unet.add_embedding.linear_1.weight' in changed


def test_a_consistency_model(trained):
  """Adapters out of a cache, with the guidance that the config gives; it cannot be guided twice."""
  more = {
    'settings.sample.sampler': 'lcm', 'settings.sample.guidance': 1.0, 'dtype': 'float32',
    'settings.distilled_guidance': 2.0, 'settings.cache': True, 'data.transforms': '()',
    'settings.lora.targets': "('to_q', 'time_embedding.linear_1')",
  }
  theirs, _, made = trained('lora', 'lcm', **more)
  run = TrainedRun(str(made.parent))
  assert run.model.conditioners['distilled_guidance'].scale == 2.0
  stored = load_file(made / 'pytorch_lora_weights.safetensors')
  assert any(value.any() for key, value in stored.items() if 'lora_B' in key and 'linear_1' in key)
  theirs.load_lora_weights(made)
  with pytest.raises(AssertionError):
    trained('lora', 'lcm', **more | {'settings.sample.guidance': 3.0})
  with pytest.raises(AssertionError):
    trained('lora', 'sd1', **more | {'settings.sample.sampler': 'ddim'})


@pytest.mark.parametrize(('recipe', 'name', 'rate'), [
  ('sd35_medium_lora', 'sd35', 0.02), ('flux_lora', 'flux_dev', 0.1),
])
def test_adapters(recipe, name, rate, trained):
  """In both layouts they draw what diffusers draws with them, which is another picture."""
  theirs, source, made = trained(recipe, name, **{'optimizer.learning_rate': rate})
  flux = name.startswith('flux')
  more = {} if flux else dict(negative_prompt=[''] * 2, guidance_scale=7.0)
  plain = draw_theirs(theirs, SIZE, **more)
  theirs.load_lora_weights(made)
  wanted = draw_theirs(theirs, SIZE, **more)
  assert np.abs(wanted - plain).max() > 1e-2
  model, weights, sample = load_model(str(source))
  merged = [
    add_lora(model, weights, str(made / file))
    for file in ('pytorch_lora_weights.safetensors', 'kohya.safetensors')
  ]
  jax.tree.map(np.testing.assert_array_equal, *merged)
  assert_same(draw(model, merged[0], sample, SIZE, PROMPTS), wanted, recipe)
  stored = load_file(made / 'pytorch_lora_weights.safetensors')
  assert all(key.startswith('transformer.') for key in stored)
  assert 'single_transformer_blocks' in json.dumps([*stored]) or not flux
  others = [*load_file(made / 'kohya.safetensors')]
  block = 'lora_unet_double_blocks_0_img_attn' if flux else 'lora_unet_joint_blocks_0_x_block_attn'
  assert {f'{block}_qkv.lora_down.weight', f'{block}_proj.alpha'} <= set(others)


def test_adapters_of_pixart(trained, tmp_path):
  """diffusers has no reader of PixArt's: PEFT puts them into its transformer, and writes them."""
  theirs, source, made = trained('pixart_lora', 'pixart_sigma', **{
    'settings.sample.sampler': 'dpmpp_2m', 'dtype': 'float32', 'optimizer.learning_rate': 0.1,
  })
  plain = pixart.draw_theirs(theirs, SIZE)
  file = made / 'pytorch_lora_weights.safetensors'
  said = json.loads(metadata(file)['lora_adapter_metadata'])
  config = peft.LoraConfig(**{key.removeprefix('transformer.'): v for key, v in said.items()})
  theirs.transformer = peft.get_peft_model(theirs.transformer, config)
  loaded = peft.set_peft_model_state_dict(theirs.transformer, {
    n.replace('transformer.', 'base_model.model.', 1): t for n, t in load_file(file).items()
  })
  assert not loaded.unexpected_keys and not any('lora' in key for key in loaded.missing_keys)
  theirs.transformer.save_pretrained(tmp_path)
  theirs.transformer = theirs.transformer.merge_and_unload()
  wanted = pixart.draw_theirs(theirs, SIZE)
  assert np.abs(wanted - plain).max() > 1e-2
  model, weights, sample = load_model(str(source))
  files = file, made / 'kohya.safetensors', tmp_path
  first, *others = [add_lora(model, weights, str(one)) for one in files]
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, first, other)
  assert np.abs(pixart.draw(model, first, sample, SIZE) - wanted).max() < 2e-4
