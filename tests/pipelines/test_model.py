"""Latents as the U-Net sees them."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.cache import moments_encoder
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.diffusion.samplers import infos
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX
from diffusion_jax.models.autoencoder import decode_tiled, encode_tiled
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pipelines import spaces
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.directory import load_model, save_model
from diffusion_jax.pipelines.options import DECODINGS
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.spaces import LatentConfig, fold, unfold
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Condition
from tests import tiny

SAMPLERS = infos()


def test_folding_puts_each_square_into_the_channels_of_one_place():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  folded = np.asarray(fold(jnp.asarray(x), 2))
  assert folded.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].ravel())
  np.testing.assert_array_equal(unfold(jnp.asarray(folded), 2), x)
  np.testing.assert_array_equal(fold(jnp.asarray(x), 1), x)


@pytest.mark.parametrize('patch', [1, 2])
def test_decoding_undoes_the_scaling_and_the_folding(parts, patch):
  unet = dataclasses.replace(
    tiny.UNET, in_channels=4 * patch**2, out_channels=4 * patch**2, sample_size=16 // patch
  )
  model, frozen = tiny.assemble(
    unet, **parts, schedule=ScheduleConfig(), parameterization=Parameterization(),
    latent_patch_size=patch,
  )
  config = model.space.autoencoder.config
  autoencoder = model.space.autoencoder.bind(frozen['autoencoder'])
  z = 0.1 * np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
  latents = model.space.scaled(z)
  assert latents.shape == (2, *model.space.shape(*model.trained_size))
  scaled = (z[0, 0, 0] - config.shift_factor) * config.scaling_factor
  np.testing.assert_allclose(latents[0, 0, 0, :4], scaled, rtol=1e-6)
  wanted = jnp.clip(autoencoder.decode(z), -1, 1)
  np.testing.assert_allclose(model.space.decode(frozen, latents), wanted, atol=1e-5)


def test_decoding_in_slices_and_tiles(parts, monkeypatch):
  model, frozen = tiny.assemble(
    tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization(),
  )
  space, rng = model.space, np.random.default_rng(0)
  z = rng.normal(size=(2, 4, 80, 4)).astype(np.float32)
  whole, sliced, tiled, undivided = (space.decode(frozen, z, how) for how in DECODINGS)
  np.testing.assert_allclose(sliced, whole, atol=1e-5)
  np.testing.assert_array_equal(undivided, whole)
  loops = [str(jax.make_jaxpr(lambda z, how=how: space.decode(frozen, z, how))(z)).count('scan[')
           for how in DECODINGS]
  assert loops[1] == loops[0] + 1  # One after the other; memory: tests/models/test_autoencoder.py.
  by_hand = decode_tiled(space.autoencoder.bind(frozen['autoencoder']), z / 0.8 + 0.1)
  np.testing.assert_allclose(tiled, jnp.clip(by_hand, -1, 1), atol=1e-5)
  assert 1e-4 < np.abs(tiled - whole).max()
  monkeypatch.setattr(spaces, 'MOST_WHOLE', 4 * 80 - 1)
  for how in ('whole', 'sliced'):
    np.testing.assert_array_equal(space.decode(frozen, z, how), tiled)
  np.testing.assert_array_equal(space.decode(frozen, z, 'undivided'), whole)
  with pytest.raises(UserError, match='whole, sliced, tiled, undivided'):
    SampleConfig(decoding='half').check(model.noise, model.parameterization)


def test_large_images_are_encoded_in_tiles(parts, monkeypatch):
  """For a picture to start from and one to edit, for training and for the cache of it."""
  model, frozen = tiny.assemble(
    tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization(),
  )
  space, rng = model.space, np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2, 8, 160, 3), np.uint8)
  images = to_float(pixels)
  whole = space.moments(frozen, images)
  mean, logvar = encode_tiled(space.autoencoder.bind(frozen['autoencoder']), images)
  assert np.abs(mean - whole['mean']).max() > 1e-4
  monkeypatch.setattr(spaces, 'MOST_WHOLE', 4 * 80 - 1)
  same = functools.partial(np.testing.assert_allclose, atol=1e-5)
  same(space.raw(frozen, images), mean)
  same(space.encode(frozen, images), space.scaled(mean))
  found = moments_encoder(model)(frozen, pixels)
  same(found['mean'], mean)
  same(found['logvar'], logvar)


def test_a_denoiser_that_tells_no_size_is_sampled_at_that_of_its_training(parts, tmp_path):
  unet, how = dataclasses.replace(tiny.UNET, sample_size=None), {
    'space': LatentConfig(parts['autoencoder']), 'conditioners': {'text': {'path': parts['clip']}},
  }
  model, _ = assemble(
    unet, *how.values(), ScheduleConfig(), Parameterization(), size=(48, 32)
  )
  assert model.trained_size == (48, 32) and model.size_of(None, 64) == (48, 64)
  assert dataclasses.replace(model, size=None).trained_size == (2, 2)
  params = jax.tree.map(np.asarray, jax.jit(model.denoiser.initialize)(jax.random.key(0)))
  save_model(tmp_path / 'model', model, params, **how, sample=SampleConfig(), dtype='float32')
  assert load_model(str(tmp_path / 'model'))[0].trained_size == (48, 32)
  # And one that tells another than that of this training, in the layout of diffusers.
  model, _ = assemble(tiny.UNET, *how.values(), ScheduleConfig(), Parameterization(), size=(48, 32))
  save_model(tmp_path / 'told', model, params, **how, sample=SampleConfig(), dtype='float32')
  config = json.loads((tmp_path / 'told' / 'unet' / 'config.json').read_text())
  again = load_model(str(tmp_path / 'told'))[0]
  assert config['sample_size'] == [24, 16] and again.trained_size == (48, 32)


def test_a_network_of_unfolded_latents_is_refused(parts):
  with pytest.raises(UserError, match='has 16; set both to 16'):
    tiny.assemble(
      tiny.UNET, **parts, schedule=ScheduleConfig(), parameterization=Parameterization(),
      latent_patch_size=2,
    )


@pytest.fixture(scope='module')
def zero_snr(parts):
  schedule = ScheduleConfig(rescale_betas_zero_snr=True)
  return tiny.assemble(
    tiny.UNET, **parts, schedule=schedule, parameterization=Parameterization('v_prediction'),
  )[0]


@pytest.mark.parametrize('name', SAMPLERS)
def test_every_sampler_draws_from_a_model_in_continuous_time(by_class, name):
  """Of one noise the same with every seed where it adds none, as its row of the table says."""
  model, weights = by_class
  assert model.noise.table is None
  # Of three steps none begins where this one by itself adds noise, below sigma = alpha.
  options = {'high': 9.0} if name == 'sa_solver' else {}
  config = SampleConfig(name, steps=3, guidance=2.0, options=options)
  noise = np.random.default_rng(0).normal(size=(2, *model.space.shape(8, 8))).astype(np.float32)
  first, again, other = (np.concatenate(list(model.sample(
    weights, ['red', 'green'], config, seed=seed, mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    batch_size=2, noise=noise,
  ))) for seed in (0, 0, 1))
  assert first.shape == (2, 8, 8, 3) and first.dtype == np.float32
  assert np.isfinite(first).all() and np.abs(first).max() <= 1 and first.std() > 0.05
  np.testing.assert_array_equal(again, first)
  assert SAMPLERS[name].stochastic == (other != first).any()


def test_a_learned_variance_lies_between_the_fixed_ones(zero_snr):
  """Channels of -1 and 1 are the posterior's variance and the larger one; guidance spares them."""
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(2, 16, 16, 4)).astype(np.float32)
  text = rng.normal(size=(2, 10, 16)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 2)
  mean = lambda x, t, c: 0.3 * x + 0.1 * c.text.mean((1, 2))[:, None, None, None]

  def draw(name, network, channels):
    config = dataclasses.replace(zero_snr.denoiser.config, out_channels=channels)
    stand_in = types.SimpleNamespace(config=config, bind=lambda _: network)
    model = dataclasses.replace(zero_snr, denoiser=stand_in)
    sample = SampleConfig(name, steps=3, guidance=2.0)
    numbers = sample.numbers(model.noise)
    told = Condition(text), Condition(-text)
    run = lambda: model.sample_z({'denoiser': {}}, noise, keys, *told, sample.program, numbers)
    return np.asarray(jax.jit(run)())

  def learned(v):
    return draw('ddpm', lambda x, t, text: jnp.concatenate(
      [mean(x, t, text), jnp.full_like(x, v)], axis=-1
    ), 8)

  small, large = draw('ddpm', mean, 4), draw('ddpm_large', mean, 4)
  assert np.abs(small - large).max() > 0.05
  np.testing.assert_allclose(learned(-1.0), small, atol=1e-5)
  np.testing.assert_allclose(learned(1.0), large, atol=1e-5)


def test_a_model_with_an_impossible_folding_is_refused(finished, copy_of):
  model = copy_of(finished) / 'model'
  for value in ('2', 0, True):
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({**index, 'latent_patch_size': value}))
    with pytest.raises(UserError, match='latent_patch_size'):
      load_model(str(model))
