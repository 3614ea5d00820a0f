"""Transformers as denoisers of the diffusion task: on every process, in latents and in pixels."""

import jax
import numpy as np
import pytest

from benchmarks.run import built
from diffusion_jax.config import parse, untyped
from diffusion_jax.parallel.mesh import put_batch
from diffusion_jax.recipe import load_config
from diffusion_jax.run import TrainedRun
from diffusion_jax.train.state import abstract_state, initializer
from diffusion_jax.train.step import make_step
from tests import tiny
from tests.train.tasks.test_models import PROCESSES, _same_images, _trained

HEADS = {'num_attention_heads': 2, 'attention_head_dim': 12}
LATENTS = {'sample_size': 16, 'patch_size': 4, 'in_channels': 4, 'out_channels': 4}
PIXELS = {'sample_size': tiny.SIZE, 'patch_size': 8, 'in_channels': 3, 'out_channels': 3}
DIT = {
  'type': 'dit', 'num_layers': 1, 'num_embeds_ada_norm': None, 'cross_attention_dim': 16,
  'positions': 'rotary', 'qk_norm': 'rms_norm',
}
MMDIT = {
  'type': 'mmdit', 'num_layers': 1, 'joint_attention_dim': 16, 'caption_projection_dim': 24,
  'pooled_projection_dim': None, 'positions': 'learned', 'qk_norm': 'rms_norm',
}
PIXART = {
  'type': 'pixart', 'num_layers': 1, 'cross_attention_dim': 24, 'caption_channels': 16,
  'use_additional_conditions': True,
}
MODELS = {
  'dit, flow, latents': (DIT | LATENTS, 'flow'), 'mmdit, edm, pixels': (MMDIT | PIXELS, 'edm'),
  'pixart, v, latents': (PIXART | LATENTS, 'vp'),
}


@pytest.mark.parametrize('name', MODELS)
def test_trained_sampled_exported_and_opened_again(name, parts, tmp_path, command):
  denoiser, process = MODELS[name]
  schedule, objective, sample = PROCESSES[process]
  values = tiny.diffusion_config(parts, {
    'schedule': schedule, 'objective': objective, 'sample': sample, 'denoiser': denoiser | HEADS,
  })
  for key in ('unet', 'autoencoder', 'latent_patch_size'):
    values['settings'].pop(key)
  pixels = {'type': 'pixels'}
  latents = {'type': 'latents', 'autoencoder': parts['autoencoder']}
  values['settings']['space'] = pixels if 'pixels' in name else latents
  values['loop']['evaluate_samples'] = 0
  workdir = _trained(values, tmp_path, command)
  _same_images(workdir, 'cat', command, tmp_path)
  run = TrainedRun(str(workdir))
  assert ('sizes' in run.model.conditioners) == ('pixart' in name)


@pytest.mark.parametrize('name', ['dit_flow', 'mmdit', 'class_conditional'])
def test_recipes_of_the_package_take_steps(name, tmp_path):
  """Of two random examples each. The first moves the last layer alone, the second the gates, the
  third what they let through, the fourth texts that were changed before."""
  overrides = ('loop.batch_size=2', 'loop.total_steps=4', 'settings.denoiser.num_layers=3')
  config = load_config(f'openmoji/{name}', [f'--config.{one}' for one in overrides])
  with tiny.few_devices(1):
    t = built(untyped(parse(config)), tmp_path / 'run', synthetic=True)
    abstract = abstract_state(t.task, t.optimizer, True, t.mesh)
    state = initializer(t.task, t.optimizer, 0, abstract)(None)
    first, losses = jax.device_get(state.params), []
    update = make_step(t.task, t.optimizer, abstract, batch_size=2, ema_halflife_images=100.0)
    for _ in range(4):
      batch = next(t.loader)
      fields = {name: batch[name] for name in t.task.batch_fields}
      state, metrics = update(state, t.task.frozen, put_batch(fields, t.mesh))
      losses.append(float(metrics['loss'].total / metrics['loss'].count))
  assert np.isfinite(losses).all() and t.task.model.trained_size == (64, 64)
  moved = {n for n, v in jax.device_get(state.params).items() if np.any(v != first[n])}
  assert len(moved) > 0.9 * len(first)
