"""Tiles and slices against diffusers' enable_tiling and enable_slicing, with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import network
from diffusion_jax.models.autoencoder import (
  decode_sliced,
  decode_tiled,
  encode_sliced,
  encode_tiled,
)

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def theirs(randomized):
  # Tiles of 8 latents that overlap by 2.
  return randomized(diffusers.AutoencoderKL(
    down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16,
    mid_block_add_attention=False,
  ))


def test_tiles(theirs, ported, quick_jit):
  _, graphdef, params = ported('autoencoder', theirs)
  rng = np.random.default_rng(0)
  # Tiles of 8 latents start every 6: the last column of 9 is cut short, the last row of 14 lies
  # within the one before.
  images = rng.uniform(-1, 1, (2, 10, 28, 3)).astype(np.float32)
  z = rng.normal(size=(2, 14, 9, 4)).astype(np.float32)
  whole = theirs.decode(nchw(z)).sample
  theirs.enable_tiling()
  posterior = theirs.encode(nchw(images)).latent_dist
  decoded = theirs.decode(nchw(z)).sample

  def run(params):
    ours = network.merge(graphdef, params)
    return (*encode_tiled(ours, jnp.asarray(images), tile=8, overlap=2),
            decode_tiled(ours, jnp.asarray(z), tile=8, overlap=2))

  mean, logvar, image = quick_jit(run)(params)
  np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-4)
  np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-4)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
  assert np.abs(image - nhwc(whole)).max() > 1e-2


def test_slices(theirs, ported, quick_jit):
  _, graphdef, params = ported('autoencoder', theirs)
  images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 12, 3)).astype(np.float32)
  theirs.enable_slicing()
  posterior = theirs.encode(nchw(images)).latent_dist
  decoded = theirs.decode(posterior.mean).sample

  def run(params):
    ours = network.merge(graphdef, params)
    mean, logvar = encode_sliced(ours, jnp.asarray(images), at_once=2)
    return mean, logvar, decode_sliced(ours, mean)

  mean, logvar, image = quick_jit(run)(params)
  np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-4)
  np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-4)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
