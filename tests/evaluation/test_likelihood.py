"""Bits per dimension of a text-to-image model: closed forms, and the path from weights to a row."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffusion_jax.config import typed
from diffusion_jax.diffusion import bounds, likelihood
from diffusion_jax.diffusion.bounds import continuous_bound, discrete_bound, gaussian_bits
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.mixture import GaussianMixture
from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluator import run_all, scores_of
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.likelihood import (
  ESTIMATES,
  Likelihood,
  LikelihoodConfig,
  discrete_bits,
  image_keys,
  latent_bits,
  make_encoder,
  make_scorer,
)
from diffusion_jax.parallel.mesh import MeshConfig, in_batches, make_mesh, put_params
from diffusion_jax.pipelines.spaces import fold
from diffusion_jax.run import TrainedRun
from tests import tiny

CHEAP = LikelihoodConfig(draws=3, solver='heun', ode_steps=2)
SAMPLES = 6
DATA = GaussianMixture(np.ones(1), np.array([[[[0.5], [-1.0]]]]), np.array([[[[0.04], [1.5]]]]))


@pytest.mark.parametrize('zero', [True, False])
def test_the_ideal_denoiser_of_a_gaussian_has_the_closed_forms(zero, monkeypatch):
  """Means over noises of +-1, exact for what is quadratic in the noise, as all is here."""
  schedule = Schedule(ScheduleConfig(rescale_betas_zero_snr=zero))
  images = np.array([[[[0.6], [-2.0]]], [[[0.5], [1.0]]], [[[-0.1], [0.3]]]])
  signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]).reshape(4, 1, 2, 1)
  noise = lambda keys, index, like, draw=None: jnp.tile(signs.astype(like.dtype), (3, 1, 1, 1))
  for module in (bounds, likelihood):
    monkeypatch.setattr(module, 'unit_noise', noise)
  config = LikelihoodConfig(draws=1000, ode_steps=32)
  with jax.enable_x64(True):
    noise = schedule
    score = jax.jit(partial(latent_bits, DATA.denoise, noise, keys=None, config=config))
    found = score(jnp.asarray(np.repeat(images, 4, axis=0)))
  wanted = gaussian_bits(images, DATA.means[0], DATA.variances[0], schedule.alphas, schedule.sigmas)
  for name in ESTIMATES:
    value = np.asarray(found[name]).reshape(3, 4).mean(axis=1)
    np.testing.assert_allclose(value, wanted[name], atol=3e-4, err_msg=name)
  # A step's one estimate serves all noise down to the next step's, so steps cost bits.
  assert wanted['discrete'].mean() > wanted['continuous'].mean() + 0.05


def test_without_terminal_signal_the_closed_form_is_the_blurred_density():
  schedule = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
  x0, eps = np.array([0.6, -0.7]), np.polynomial.hermite_e.hermegauss(20)
  blur = schedule.sigmas[0] / schedule.alphas[0]
  density = norm.logpdf(x0[:, None] + blur * eps[0], 0.5, math.sqrt(0.04 + blur**2))
  wanted = -(density @ eps[1]) / eps[1].sum() / math.log(2)
  found = gaussian_bits(
    x0[:, None], np.array([0.5]), np.array([0.04]), schedule.alphas, schedule.sigmas
  )
  np.testing.assert_allclose(found['continuous'], wanted, rtol=1e-6)
  np.testing.assert_allclose(found['flow'], wanted, rtol=1e-6)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def loaded(finished, mesh):
  with tiny.few_devices():
    run = TrainedRun(str(finished))
    model, weights = run.model, run.weights()
  return model, model.on_mesh(weights, mesh)


@pytest.fixture(scope='module')
def rows(finished, command, tmp_path_factory):
  """scores.json of the command."""
  out = tmp_path_factory.mktemp('likelihood') / 'bits.json'
  assert command(
    'evaluate', 'likelihood', '--workdir', finished, '--out', out, '--samples', SAMPLES,
    '--draws', CHEAP.draws, '--solver', CHEAP.solver, '--ode_steps', CHEAP.ode_steps, '--seed', 3,
  ) == 0
  return json.loads(out.read_text())


@pytest.fixture(scope='module')
def by_hand(loaded, sources):
  """(latents, text, keys, offset, images) of those images, step by step from the docstrings."""
  model, weights = loaded
  config = model.space.autoencoder.config
  records = shuffled(sources[1], SAMPLES)
  images = np.stack([record['image'] for record in records]) / 127.5 - 1
  _, key_latents, key_noise, key_offset = jax.random.split(jax.random.key(3), 4)
  each = lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(SAMPLES))
  mean, logvar = jax.jit(model.space.autoencoder.bind(weights['autoencoder']).encode)(images)
  eps = jnp.stack([
    jax.random.normal(jax.random.fold_in(key, 0), mean.shape[1:]) for key in each(key_latents)
  ])
  log_q = norm.logpdf(eps) - np.asarray(logvar) / 2 - math.log(config.scaling_factor)
  tokens = model.text.tokens([record['captions'][0] for record in records])
  text = jax.jit(model.condition)(weights, {'tokens': tokens})
  return {
    'latents': model.space.scaled(mean + jnp.exp(logvar / 2) * eps), 'text': text,
    'log_q': log_q.sum(axis=(1, 2, 3)), 'keys': each(key_noise), 'images': images,
    'offset': jax.random.uniform(key_offset),
  }


def test_the_rows_are_the_means_of_direct_calls(rows, loaded, by_hand):
  model, weights = loaded
  schedule, x0, keys = model.noise, by_hand['latents'], by_hand['keys']

  @jax.jit
  def direct(weights, x0, text, keys, offset):
    denoise = lambda x, a, s: model.denoise(weights)(x, a, s, text)
    draws = {'draws': CHEAP.draws, 'offset': offset}
    levels = schedule.levels()
    return {
      'discrete': discrete_bound(denoise, x0, *levels, keys, **draws).total,
      'continuous': continuous_bound(
        denoise, x0, schedule.smooth_process, keys, t_min=0.0, **draws
      ).total,
      'flow': flow_likelihood(
        denoise, x0, schedule.smooth_process, keys, t_min=0.0, start_noise=True, solver='heun',
        steps=2,
      ).bits,
    }

  bits = direct(weights, x0, by_hand['text'], keys, by_hand['offset'])
  for name, value in bits.items():
    row = f'latent_bits_per_dim_{name}'
    assert np.isfinite(value).all() and np.std(value) > 1e-3
    assert rows['model'][row] == pytest.approx(float(np.mean(value)), abs=2e-4), name
    error = float(np.std(value, ddof=1)) / SAMPLES**0.5
    assert rows['model'][f'{row}_stderr'] == pytest.approx(error, rel=0.01)

  variance = (rows['settings']['decoder_std_in_levels'] / 127.5) ** 2
  output = np.asarray(jax.jit(model.space.decode)(weights, x0), np.float64)
  std, half, images = variance**0.5, 1 / 255, by_hand['images']
  upper = np.where(images > 1 - half, 1, norm.cdf((images + half - output) / std))
  lower = np.where(images < half - 1, 0, norm.cdf((images - half - output) / std))
  nats = np.asarray(bits['continuous']) * x0[0].size * math.log(2) + by_hand['log_q']
  nats = nats - np.log(upper - lower).sum(axis=(1, 2, 3))
  wanted = nats.mean() / images[0].size / math.log(2)
  assert rows['model']['image_bits_per_dim_bound'] == pytest.approx(wanted, rel=1e-4)


def test_columns_compare_with_an_untrained_network_and_a_gaussian(
  rows, loaded, by_hand, sources, capsys
):
  names = [f'latent_bits_per_dim_{name}' for name in ESTIMATES] + ['image_bits_per_dim_bound']
  assert rows.keys() == {'model', 'untrained', 'gaussian', 'settings', 'measured'}
  for column in ('model', 'untrained', 'gaussian'):
    assert rows[column].keys() == {row for name in names for row in (name, f'{name}_stderr')}
    assert all(map(math.isfinite, rows[column].values()))
  assert all(rows['model'][name] != rows['untrained'][name] for name in names)
  settings = rows['settings']
  assert settings['samples'] == SAMPLES and settings['training_images'] == len(sources[0])
  assert settings['latent_dims'] == 8 * 8 * 16 and settings['solver'] == 'heun'

  model, weights = loaded
  encode = jax.jit(model.space.autoencoder.bind(weights['autoencoder']).encode)
  images = np.stack([record['image'] for record in sources[0]]) / 127.5 - 1
  mean, logvar = encode(images)
  latents, noise = model.space.scaled(mean), jnp.exp(logvar).mean(axis=0)[None]
  scale = model.space.autoencoder.config.scaling_factor
  moments = latents.mean(axis=0), latents.var(axis=0) + scale**2 * fold(noise, 2)[0]
  bits = gaussian_bits(by_hand['latents'], *moments, *model.noise.levels())
  for name, value in bits.items():
    assert rows['gaussian'][f'latent_bits_per_dim_{name}'] == pytest.approx(value.mean(), abs=0.02)


def test_an_image_keeps_its_value_in_any_batch_and_the_caption_counts(loaded, by_hand, mesh):
  model, weights = loaded
  score = make_scorer(model, ('tokens',), CHEAP, by_hand['offset'])
  latents, keys = np.asarray(by_hand['latents']), image_keys(jax.random.key(5), SAMPLES)
  tokens = model.text.tokens(['red apple', 'cat face', 'car', 'book', 'flag', 'tree'])
  run = lambda *rows: next(in_batches(score, weights, *rows, mesh=mesh, batch_size=8))
  together = run(latents, keys, tokens)
  other = run(latents[[4, 1, 1]], keys[[4, 1, 1]], tokens[[4, 1, 2]])
  for name in ESTIMATES:
    assert len(set(together[name].round(5))) == SAMPLES
    np.testing.assert_allclose(other[name][:2], together[name][[4, 1]], rtol=1e-5)
    assert other[name][2] != other[name][1]


def test_images_have_latents_of_their_own_in_any_batch(loaded, sources):
  """On eight devices, for whose sake a batch is filled up."""
  mesh = make_mesh(MeshConfig())
  model, weights = loaded
  encode, params = make_encoder(model), (put_params(weights['autoencoder'], mesh), jnp.ones(()))
  images = np.stack([record['image'] for record in shuffled(sources[1], 4)])
  rows = images, image_keys(jax.random.key(0), 4)
  run = lambda *rows: next(in_batches(encode, params, *rows, mesh=mesh, batch_size=8))
  together, other = run(*rows), run(*(row[[3, 0]] for row in rows))
  for name, value in together.items():
    np.testing.assert_allclose(other[name], value[[3, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [
  {'trace': 'exakt'}, {'solver': 'euler'}, {'draws': 0}, {'probes': 0}, {'ode_steps': -1},
])
def test_impossible_settings_are_refused(options):
  (name, value), = options.items()
  with pytest.raises(UserError, match=f'{name}.*{value}'):
    typed(LikelihoodConfig, options)


@pytest.mark.parametrize('images', [1, 100_000])
def test_the_number_of_images_is_checked_first(images, loaded, sources, mesh):
  evaluator = Likelihood(train=sources[0], test=sources[1], mesh=mesh, images=images)
  with pytest.raises(UserError, match=f'{images} samples cannot be scored; choose 2 to'):
    next(evaluator.run(*loaded, jax.random.key(0)))


def test_a_model_is_scored_while_it_is_trained_as_by_the_command(rows, loaded, sources, mesh):
  evaluator = Likelihood(
    train=sources[0], test=sources[1], mesh=mesh, images=SAMPLES, **dataclasses.asdict(CHEAP)
  )
  found = scores_of(run_all(
    [evaluator], *loaded, jax.random.key(3), samples=2, seconds=1.0, baselines=False
  ))
  assert list(found) == ['test', 'settings'] and list(found['test']) == evaluator.metrics
  assert found['test'] == pytest.approx(rows['model'], rel=1e-5)


def test_bits_beside_other_figures_are_those_of_the_command(loaded, sources, rows, mesh):
  model, weights = loaded
  records = shuffled(sources[1], SAMPLES)
  bits = discrete_bits(model, records, draws=CHEAP.draws, seed=3, mesh=mesh, batch_size=8)
  found = [bits(weights, items) for items in (range(0, 4), range(4, SAMPLES))]
  name = 'latent_bits_per_dim_discrete'
  assert all(set(part) == {name} for part in found)
  values = np.concatenate([part[name] for part in found])
  assert values.shape == (SAMPLES,)
  assert values.mean() == pytest.approx(rows['model'][name], rel=1e-5)
