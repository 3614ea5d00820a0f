"""What latents go through: known answers of each, and each trained and read back."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import kind_of, read_part
from diffusion_jax.models import fsq
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.network import Network, under
from diffusion_jax.registry import BOTTLENECKS, load
from diffusion_jax.train.bottlenecks.bottleneck import annealed, code_metrics
from diffusion_jax.train.bottlenecks.gumbel import Gumbel, kl_from_uniform
from diffusion_jax.train.bottlenecks.vq import CODES, VQ
from diffusion_jax.train.tasks.autoencoder import (
  AutoencoderTask,
  AutoencoderTaskConfig,
  upgrade_settings,
)
from tests import tiny

SHAPE = AutoencoderKLConfig(
  latent_channels=3, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
  mid_block_add_attention=False,
)
SETTINGS = {
  'kl': {'weight': 0.01}, 'plain': {}, 'vq': {'codes': 12}, 'fsq': {'levels': (4, 3)},
  'gumbel': {'codes': 12, 'code_channels': 5},
}


@pytest.fixture(scope='module')
def images():
  return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)


def test_the_codebook_is_the_average_of_the_paper():
  """Recurrence of van den Oord et al. 2017, eq. 6-8, in NumPy, over several batches."""
  vq = VQ(codes=4, decay=0.9, dead_below=0.0)
  rng, config = np.random.default_rng(1), VQ(codes=4).config(SHAPE)
  params = {CODES: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
  carry, counts, sums = vq.carry(config), np.zeros(4), np.zeros((4, 3))
  wanted = np.asarray(params[CODES], np.float64)
  for _ in range(3):
    z = rng.normal(size=(2, 2, 2, 3)).astype(np.float32)
    indices = rng.integers(0, 3, (2, 2, 2))  # Nothing is ever nearest to the last code.
    carry = vq.next_carry(carry, (z, jnp.asarray(indices), jnp.zeros(indices.shape)))
    params = vq.constrain(params, carry)
    for code in range(4):
      own = z[indices == code]
      counts[code] = 0.9 * counts[code] + 0.1 * len(own)
      sums[code] = 0.9 * sums[code] + 0.1 * own.sum(0)
      wanted[code] = sums[code] / counts[code] if counts[code] else wanted[code]
  np.testing.assert_allclose(params[CODES], wanted, rtol=1e-5)
  assert float(carry['revived']) == 0


def test_dead_codes_begin_anew_at_latents_of_the_batch():
  vq = VQ(codes=4, decay=0.5, dead_below=0.1)
  z = np.arange(8.0, dtype=np.float32).reshape(1, 2, 4, 1).repeat(3, -1)
  random = np.linspace(1, 0, 8).reshape(1, 2, 4)  # The last latents come first.
  carry = {
    'counts': jnp.array([2.0, 2.0, 0.1, 0.1]), 'sums': jnp.ones((4, 3)), 'revived': jnp.ones(())
  }
  indices = jnp.zeros((1, 2, 4), int).at[0, 0].set(1)
  after = vq.next_carry(carry, (z, indices, random))
  codes = vq.constrain({CODES: jnp.zeros((4, 3))}, after)[CODES]
  np.testing.assert_allclose(codes[2:, 0], [7.0, 6.0])
  np.testing.assert_allclose(after['counts'], [3.0, 3.0, 2.0, 2.0])  # 8 latents of 4 codes.
  assert float(after['revived']) == 3
  fresh = vq.next_carry(vq.carry(vq.config(SHAPE)), (z, indices, random))
  assert float(fresh['revived']) == 0 and (fresh['counts'] > 0).all()


@pytest.mark.parametrize('levels', [(8, 5, 5, 5), (2, 3), (7,), (16, 2, 4)])
def test_codes_of_fsq_and_their_numbers_are_a_bijection(levels):
  count = math.prod(levels)
  numbers = jnp.arange(count)
  codes = fsq.to_codes(numbers, levels)
  assert len(np.unique(codes, axis=0)) == count and np.abs(codes).max() <= 1
  np.testing.assert_array_equal(fsq.to_indices(codes, levels), numbers)
  # Every code is the rounding of some z, and nothing else is; 0 stays 0.
  wide = np.linspace(-9, 9, 4001, dtype=np.float32)[:, None].repeat(len(levels), 1)
  for channel, size in enumerate(levels):
    found = np.unique(np.round(np.asarray(fsq.quantize(wide, levels))[:, channel] * (size // 2)))
    np.testing.assert_array_equal(found, np.arange(size) - size // 2)
  np.testing.assert_allclose(fsq.bound(jnp.zeros(len(levels)), levels), 0, atol=1e-5)


def test_fsq_is_the_listing_of_the_paper():
  """Mentzer et al. 2023, appendix A.1, in NumPy; the gradient is that of the bound."""
  levels, z = (8, 5), np.random.default_rng(2).normal(size=(50, 2)).astype(np.float32)
  half = (np.array(levels) - 1) * 1.001 / 2
  shift = np.arctanh(np.array([0.5, 0.0]) / half)
  bounded = np.tanh(z + shift) * half - [0.5, 0.0]
  np.testing.assert_allclose(fsq.quantize(z, levels), np.round(bounded) / [4, 2], rtol=1e-5)
  slope = (1 - np.tanh(z + shift) ** 2) * half / [4, 2]
  found = jax.grad(lambda z: fsq.quantize(z, levels).sum())(jnp.asarray(z))
  np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-5)


def test_the_relaxation_is_a_code_where_it_is_cold_and_the_mean_where_it_is_hot():
  network = Network.of(Gumbel.network, Gumbel(codes=12, code_channels=5).config(SHAPE))
  model = network.bind(network.initialize(jax.random.key(0)))
  logits = 2 * jax.random.normal(jax.random.key(1), (3, 4, 4, 12))
  noisy = logits + jax.random.gumbel(jax.random.key(2), logits.shape)
  relaxed = lambda temperature: model.relaxed(logits, jax.random.key(2), temperature)
  np.testing.assert_allclose(relaxed(1e-4), model.codes(noisy.argmax(-1)), atol=1e-4)
  mean = np.broadcast_to(model.codes(jnp.arange(12)).mean(0), (3, 4, 4, 5))
  np.testing.assert_allclose(relaxed(1e6), mean, atol=1e-4)
  # Samples of a cold relaxation have the frequencies of the softmax (Gumbel-max).
  one = jnp.log(jnp.array([0.7, 0.2, 0.1]))
  wide = jnp.broadcast_to(one, (1, 100, 200, 3))
  drawn = (wide + jax.random.gumbel(jax.random.key(3), wide.shape)).argmax(-1)
  np.testing.assert_allclose(np.bincount(drawn.ravel()) / 20000, [0.7, 0.2, 0.1], atol=0.015)
  entropy = -(np.array([0.7, 0.2, 0.1]) * np.log([0.7, 0.2, 0.1])).sum()
  np.testing.assert_allclose(kl_from_uniform(wide), [math.log(3) - entropy], rtol=1e-3)
  found = [float(annealed(1.0, 0.2, 10, step)) for step in (0, 5, 10, 99)]
  np.testing.assert_allclose(found, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_usage_and_perplexity_of_codes():
  metrics = code_metrics(jnp.array([[[0, 1], [1, 5]]]), 10)
  assert float(metrics['codes_used'].compute()) == pytest.approx(0.3)
  bits = 0.5 * 1 + 0.5 * 2
  assert float(metrics['code_perplexity'].compute()) == pytest.approx(2**bits, rel=1e-5)


def _task(name, **changes):
  bottleneck = load(BOTTLENECKS, name)(**{**SETTINGS[name], **changes})
  config = AutoencoderTaskConfig(SHAPE, bottleneck, adversarial_weight=0.0, export_dtype='float32')
  return AutoencoderTask(config, [{'image': np.zeros((8, 8, 3), np.uint8), 'captions': ['']}])


@pytest.mark.parametrize(('name', 'changes'), [
  *((name, {}) for name in BOTTLENECKS), ('vq', {'codebook': 'gradient'})
])
def test_each_learns_and_is_read_back_to_the_bit(name, changes, images, tmp_path):
  task = _task(name, **changes)
  params = jax.jit(task.initialize)(jax.random.key(0))
  step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  carry, losses = task.carry(), []
  for number in range(12):
    (_, (metrics, observed)), gradients = step(
      params, {}, carry, {'image': images}, jax.random.key(number), 1000
    )
    if name == 'vq':  # Past the codes straight through; codes that are averages have none.
      assert gradients['autoencoder.encoder.conv_in.kernel'].any()
      assert bool(gradients[f'autoencoder.{CODES}'].any()) == bool(changes)
    losses.append(float(metrics['loss_reconstruction'].compute()))
    carry = task.next_carry(carry, observed)
    moved = jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), params, gradients)
    params = task.constrain(moved, carry)
  assert min(losses[6:]) < losses[0]
  task.export(tmp_path, jax.tree.map(np.asarray, params), {})
  part = read_part(tmp_path)
  assert part.kind == kind_of(json.loads((tmp_path / 'config.json').read_text()))
  reconstruct = jax.jit(lambda params: task.model.bind(params).reconstruct(images))
  assert part.network().shapes.keys() == part.load().keys()
  np.testing.assert_array_equal(
    reconstruct(part.load()), reconstruct(under('autoencoder', params))
  )
  if name in ('kl', 'plain'):
    _, logvar = part.network().bind(part.load()).encode(images)
    assert (name == 'plain') == bool((logvar == -30).all())
  else:
    model = part.network().bind(part.load())
    indices = model.encode_indices(images)
    assert indices.shape == (4, 8, 8) and 0 <= indices.min() <= indices.max() < 12


@pytest.mark.parametrize(('settings', 'title'), [
  ({'type': 'vq', 'codes': 16}, 'VQ autoencoder'),
  ({'type': 'gumbel', 'codes': 16, 'code_channels': 5, 'temperature_steps': 6}, 'Discrete VAE'),
])
def test_a_run_reports_the_use_of_its_codes_and_goes_on(
  settings, title, small_data, command, tmp_path
):
  values = tiny.autoencoder_config(
    {'autoencoder': tiny.ONE_LEVEL, 'bottleneck': settings, 'adversarial_weight': 0.0},
    loop={'evaluate_samples': 16 * (settings['type'] == 'vq')},
  )
  config, run = tiny.write_config(tmp_path / 'codes.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  lines = tiny.metrics(run)
  assert 0 < lines[4]['codes_used'] <= 1 and 1 <= lines[4]['code_perplexity'] <= 16
  assert title in (run / 'README.md').read_text()
  assert command('report', '--workdir', run) == 0
  tiny.check_going_on(command, config, run, tmp_path)
  if settings['type'] == 'gumbel':
    temperatures = [lines[step]['temperature'] for step in (1, 2, 3, 4)]
    assert sorted(temperatures)[::-1] == temperatures and temperatures[-1] < temperatures[0]
    return
  scores = json.loads((run / 'scores.json').read_text())['test']
  assert 0 < scores['codes_used'] <= 1 and 1 <= scores['code_perplexity'] <= 16
  assert lines[4]['codes_revived'] >= 0
  out = tmp_path / 'scores.json'
  arguments = ('--model', run / 'model', '--out', out, '--samples', 16, '--metrics', 'psnr')
  assert command('evaluate', 'autoencoder', *arguments) == 0
  assert json.loads(out.read_text())['reconstructed']['psnr'] > 0


def test_settings_of_older_runs_and_settings_without_effect():
  old = {'kl_weight': 0.5, 'kl_warmup_steps': 7, 'initial_logvar': -2.0, 'reconstruction': 'l2'}
  found = typed(AutoencoderTaskConfig, upgrade_settings(old)).bottleneck
  assert (found.weight, found.warmup_steps, found.initial_logvar) == (0.5, 7, -2.0)
  with pytest.raises(UserError, match=r'settings\.autoencoder\.use_quant_conv has no effect'):
    VQ().config(AutoencoderKLConfig(use_quant_conv=False))
  with pytest.raises(UserError, match=r'bottleneck\.type'):
    typed(AutoencoderTaskConfig, {'bottleneck': {'type': 'fsk'}})
