"""The autoencoder's losses: KL, the adversary's start and strength, LPIPS."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.config import MeshConfig, typed
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models.network import under
from diffusion_jax.models.perceptual import lpips, lpips_shapes
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.train.bottlenecks.kl import KL, kl_divergence
from diffusion_jax.train.bottlenecks.vq import VQ
from diffusion_jax.train.tasks.autoencoder import (
  AutoencoderTask,
  AutoencoderTaskConfig,
  check_pretrained,
)
from tests import tiny
from tests.tiny_pipeline import published

START = 5


def _task(**settings):
  return AutoencoderTask(AutoencoderTaskConfig(
    autoencoder=tiny.AUTOENCODER, discriminator=tiny.DISCRIMINATOR, adversarial_weight=0.4,
    adversarial_start_step=START, **settings,
  ), None)


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(-1, 1, (2, tiny.SIZE, tiny.SIZE, 3)), jnp.float32)


@pytest.fixture(scope='module')
def params():
  return jax.jit(_task().initialize)(jax.random.key(0))


@pytest.mark.parametrize(('mean', 'logvar', 'wanted'), [
  (0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, math.log(4), (3 - math.log(4)) / 2),
  (-2.0, -1.0, (4 + math.exp(-1)) / 2),
])
def test_kl_is_the_closed_form_per_latent_value(mean, logvar, wanted):
  full = lambda value: jnp.full((2, 3, 5, 4), value)
  np.testing.assert_allclose(kl_divergence(full(mean), full(logvar)), [wanted] * 2, atol=1e-6)


def test_the_adversary_starts_exactly_at_its_step(params, images):
  task = _task()
  gradient = jax.jit(jax.grad(task.loss, has_aux=True))
  batch, key = {'image': images}, jax.random.key(1)
  # Where real and fake both lie within the hinge's margin, the last bias pulls equally both ways.
  last = max(name for name in params if name.startswith('discriminator.') and 'bias' in name)
  params = {**params, last: params[last] + 5.0}
  before, (metrics, _) = gradient(params, {}, {}, batch, jax.random.clone(key), START - 1)
  assert metrics['loss_discriminator'].count == metrics['loss_generator'].count == 0
  assert not any(g.any() for n, g in before.items() if n.startswith('discriminator.'))
  after, (metrics, _) = gradient(params, {}, {}, batch, key, START)
  assert metrics['loss_discriminator'].count == metrics['loss_generator'].count == 1
  for name, g in after.items():
    # A bias of all keys shifts each row of attention logits, which softmax forgets.
    assert name.endswith('to_k.bias') or np.abs(g).max() > 1e-9, name
    reached = np.abs(before[name]).max() > 1e-9
    assert reached == name.startswith('autoencoder.') or name.endswith('to_k.bias'), name
  changed = [n for n in after if n.startswith('autoencoder.') and not np.allclose(
    after[n], before[n], rtol=1e-3, atol=1e-9)]
  assert changed


def test_the_adversarial_pull_at_the_image_is_the_given_share(params, images):
  task = _task()
  output = 0.5 * images + 0.1

  def adversarial(output):
    return task._adversarial(params, {}, images, output, START)[0]

  push = jax.jit(jax.grad(adversarial))(output)
  pull = jax.grad(lambda x: jnp.abs(x - images).mean())(output)
  np.testing.assert_allclose(
    jnp.linalg.norm(push), 0.4 * jnp.linalg.norm(pull), rtol=1e-4
  )


def test_without_adversarial_weight_there_is_no_discriminator():
  task = AutoencoderTask(AutoencoderTaskConfig(tiny.AUTOENCODER, adversarial_weight=0.0), None)
  shapes = jax.eval_shape(task.initialize, jax.random.key(0))
  assert shapes and all(name.startswith('autoencoder.') for name in shapes)


def test_lpips_counts_only_with_weights(tmp_path, images):
  rng = np.random.default_rng(0)
  weights = {
    name: np.abs(rng.normal(size=s.shape, scale=0.05)).astype(np.float32) if 'lin' in name
    else rng.normal(size=s.shape, scale=(2 / np.prod(s.shape[:-1])) ** 0.5).astype(np.float32)
    for name, s in lpips_shapes().items()
  }
  save_file(published(weights), tmp_path / 'lpips.safetensors')
  plain, task = _task(), _task(lpips_weights=str(tmp_path / 'lpips.safetensors'), lpips_weight=0.5)
  assert plain.frozen == {} and task.frozen.keys() == {'lpips'}
  output = jnp.roll(images, 3, axis=1)
  l1 = jnp.abs(output - images).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(plain._reconstruction(output, images, plain.frozen), l1, rtol=1e-6)
  perceptual = lpips(weights, output, images)
  assert (perceptual > 1e-3).all()
  found = task._reconstruction(output, images, task.frozen)
  np.testing.assert_allclose(found, l1 + 0.5 * perceptual, rtol=1e-5)


def test_reconstruction_is_absolute_or_squared_error(images):
  output = images + jnp.array([0.5, -1.0])[:, None, None, None]
  loss = lambda kind: _task(reconstruction=kind)._reconstruction(output, images, {})
  np.testing.assert_allclose(loss('l1'), [0.5, 1.0], rtol=1e-5)
  np.testing.assert_allclose(loss('l2'), [0.25, 1.0], rtol=1e-5)
  best = np.log(0.625) / 2 + np.array([0.25, 1.0]) / 1.25
  np.testing.assert_allclose(loss('gaussian'), best, rtol=1e-5)
  with pytest.raises(UserError, match='one of l1, l2, gaussian'):
    typed(AutoencoderTaskConfig, {'reconstruction': 'l3'})


def test_log_variances_start_where_the_config_says():
  task = lambda value: _task(bottleneck=KL(initial_logvar=value))
  shift = lambda value: jax.jit(task(value).initialize)(jax.random.key(0))
  bias = shift(-6.0)['autoencoder.quant_conv.bias']
  channels = tiny.AUTOENCODER.latent_channels
  np.testing.assert_array_equal(bias[channels:], -6.0)
  np.testing.assert_array_equal(bias[:channels], 0.0)


def test_a_pretrained_autoencoder_is_what_training_begins_with(tmp_path, params):
  first = tiny.AUTOENCODER
  save_params(tmp_path, first, under('autoencoder', params))
  task = _task(pretrained=str(tmp_path))
  begun = task.beginning(make_mesh(MeshConfig(), jax.local_devices()[:1]), jax.random.key(1))
  assert begun.keys() == params.keys()
  for name, value in begun.items():
    drawn = name.startswith('discriminator.') and name.endswith('kernel')
    assert np.array_equal(value, params[name]) != drawn, name
  changed = lambda **fields: check_pretrained(dataclasses.replace(task.config, **fields))
  changed(autoencoder=dataclasses.replace(first, scaling_factor=1.0))
  with pytest.raises(UserError, match=r'has latent_channels=4 and settings\.autoencoder has 8'):
    changed(autoencoder=dataclasses.replace(first, latent_channels=8))
  with pytest.raises(UserError, match='without averages'):
    changed(bottleneck=VQ(), autoencoder=dataclasses.replace(first, shift_factor=0.0))
  with pytest.raises(UserError, match='is no KL autoencoder'):
    changed(pretrained='asset:clip-openmoji-64')
  with pytest.raises(UserError, match='is no KL autoencoder'):
    changed(pretrained=str(tmp_path / 'none'))


def test_latents_have_unit_variance_also_where_nothing_is_scored(small_data, command, tmp_path):
  """The scaling is that of the same run with scores of as many test images, on any devices."""
  scalings = []
  for samples, devices in ((24, 1), (0, 8)):
    run = tmp_path / f'{samples} {devices}'
    # The adversary would take half the time of compiling, and has no part in it.
    values = tiny.autoencoder_config(
      {'adversarial_weight': 0.0, 'autoencoder': tiny.ONE_LEVEL},
      loop={'total_steps': 2, 'batch_size': 8, 'evaluate_samples': samples},
    )
    config = tiny.write_config(tmp_path / f'{samples}.py', values)
    arguments = ('train', '--config', config, '--workdir', run, '--quiet')
    assert command(*arguments, devices=devices) == 0
    written = json.loads((run / 'model' / 'config.json').read_text())
    scalings.append([written['scaling_factor'], written['shift_factor']])
  assert scalings[0][0] != 0.18215  # The default of diffusers.
  np.testing.assert_allclose(*scalings, rtol=0.05, atol=0.02)
