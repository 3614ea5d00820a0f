"""A VAE as a generative model: its bound where the likelihood is known, its prior, its commands."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.evaluation.elbo import make_elbo
from diffusion_jax.evaluation.likelihood import image_keys
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines.generator import read_generator
from diffusion_jax.pipelines.vae import VAE, VAESampleConfig
from diffusion_jax.pixels import to_float
from tests import tiny


class Linear:
  """x = W z + s eps: probabilistic PCA, whose posterior and likelihood are Gaussians."""

  scale = 0.05

  def __init__(self, too_wide: float = 0.0):
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0]
    self.w, self.too_wide = 0.15 * columns, too_wide
    self.config = types.SimpleNamespace(factor=2, latent_channels=2)

  def bind(self, params):
    return self

  def encode(self, x):
    precision = 1 + (self.w**2).sum(0) / self.scale**2
    mean = x.reshape(-1, 12) @ self.w / self.scale**2 / precision
    logvar = jnp.broadcast_to(-jnp.log(precision) + self.too_wide, mean.shape)
    return mean.reshape(-1, 1, 1, 2), logvar.reshape(-1, 1, 1, 2)

  def decode(self, z):
    return (z.reshape(-1, 2) @ self.w.T).reshape(-1, 2, 2, 3)


def test_the_bounds_are_the_likelihood_where_the_posterior_is_exact_and_above_it_else():
  rng, linear = np.random.default_rng(1), Linear()
  x = rng.normal(size=(6, 2)) @ linear.w.T + linear.scale * rng.normal(size=(6, 12))
  images = np.clip(np.round(127.5 * (x + 1)), 0, 255).astype(np.uint8).reshape(6, 2, 2, 3)
  covariance = linear.w @ linear.w.T + linear.scale**2 * np.eye(12)
  x = np.asarray(to_float(images, np.float64)).reshape(6, 12)
  square = np.einsum('bi,ij,bj->b', x, np.linalg.inv(covariance), x)
  log_p = -0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1]) + 12 * np.log(2 / 255)
  exact = -log_p / 12 / np.log(2)

  def bounds(too_wide, draws):
    model = VAE(Linear(too_wide), (2, 2))
    params = {'autoencoder': {}}, jnp.float32(linear.scale**2)
    found = make_elbo(model, draws)(params, images, image_keys(jax.random.key(0), 6))
    return np.asarray(found['elbo_bits_per_dim']), np.asarray(found['importance_bits_per_dim'])

  elbo, importance = bounds(0.0, 200)
  np.testing.assert_allclose(elbo, exact, atol=0.02)
  np.testing.assert_allclose(importance, exact, atol=0.005)
  elbo, importance = bounds(1.0, 2000)
  # KL(q || p) of a variance e times too large, in two dimensions: e - 2 nats in all.
  np.testing.assert_allclose(elbo - exact, (np.e - 2) / 12 / np.log(2), atol=0.02)
  np.testing.assert_allclose(importance, exact, atol=0.02)


def test_samples_are_decoded_from_the_prior():
  model, mesh = VAE(Linear(), (2, 2)), make_mesh(MeshConfig(), jax.devices()[:1])

  def draw(count, temperature=1.0, **how):
    config, prompts = VAESampleConfig(temperature), [''] * count
    with jax.set_mesh(mesh):
      return np.concatenate(list(model.sample(
        {'autoencoder': {}}, prompts, config, seed=4, mesh=mesh, batch_size=1000, **how
      ))).reshape(count, 12)

  images = draw(4000)
  w = Linear().w
  np.testing.assert_allclose(images.mean(0), 0, atol=0.01)
  np.testing.assert_allclose(np.cov(images.T), w @ w.T, atol=1.5e-3)
  np.testing.assert_allclose(draw(3, first=5), images[5:8], atol=1e-6)
  np.testing.assert_allclose(draw(8, temperature=0.5), images[:8] / 2, atol=1e-6)


@pytest.fixture(scope='module')
def run(once, parts, command, small_data):
  """Workdir of a run of two steps on few pictures, finished, with scores."""
  del small_data

  def make(folder):
    (folder / 'pictures').mkdir()
    rng = np.random.default_rng(0)
    for number in range(100):  # Of which the bound is of 64 that are held out.
      picture = rng.integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), np.uint8)
      Image.fromarray(picture).save(folder / 'pictures' / f'{number}.png')
    config = tiny.write_config(folder / 'vae.py', tiny._config('vae', tiny.NORMALIZE, {
      'autoencoder': tiny.ONE_LEVEL, 'reconstruction': 'gaussian', 'export_dtype': 'float32',
      'clip': parts['clip'], 'evaluation': {'metrics': ['fd']}, 'previews': 2,
    }, loop={'total_steps': 2, 'sample_every_steps': 2, 'checkpoint_every_steps': 1}, data={
      'dataset': f'folder:{folder / "pictures"}', 'test_fraction': 0.8, 'caption': 'a picture',
    }))
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('vae', make) / 'run'


def test_a_run_is_scored_and_drawn_from(run, command, tmp_path, fails):
  scores = json.loads((run / 'scores.json').read_text())
  assert scores['model']['elbo_bits_per_dim'] > 0 and scores['generated']['fd_clip'] > 0
  model, found, _ = read_generator(str(run / 'model'))
  assert isinstance(model, VAE) and model.trained_size == (tiny.SIZE, tiny.SIZE)
  assert found.keys() == {'autoencoder'}
  source = ('--model', run / 'model')
  arguments = ('--prompt', '', '--prompt', '', '--temperature', 0.7, '--out', tmp_path / 'drawn')
  assert command('sample', *source, *arguments) == 0
  assert len(list((tmp_path / 'drawn').glob('0*.png'))) == 2
  out = tmp_path / 'bits.json'
  arguments = ('--samples', 16, '--draws', 3, '--out', out)
  assert command('evaluate', 'likelihood', *source, *arguments) == 0
  bits = json.loads(out.read_text())
  assert bits['model']['importance_bits_per_dim'] <= bits['model']['elbo_bits_per_dim'] + 1e-6
  assert bits['settings']['draws'] == 3 and 'untrained' in bits
  steps = ('evaluate', 'steps', *source, '--counts', '2,3', '--out', out)
  assert 'does not draw by a sampler' in fails(*steps)
  assert 'solver does nothing' in fails(
    'evaluate', 'likelihood', *source, '--solver', 'heun', '--out', out
  )


def test_going_on_after_a_stop_is_exact(run, command, tmp_path):
  tiny.check_going_on(command, run.parent / 'vae.py', run, tmp_path)
