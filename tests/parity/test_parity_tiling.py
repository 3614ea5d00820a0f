"""Tiles and slices against diffusers' enable_tiling and enable_slicing, with random weights."""

import numpy as np
import pytest

from diffusion_jax.models import network
from diffusion_jax.models.autoencoder import decode_sliced, decode_tiled, encode_tiled

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
  z = rng.normal(size=(2, 14, 9, 4)).astype(np.float32)
  whole = theirs.decode(nchw(z)).sample
  theirs.enable_tiling()
  decoded = theirs.decode(nchw(z)).sample
  decode = lambda params: decode_tiled(network.merge(graphdef, params), z, tile=8, overlap=2)
  image = quick_jit(decode)(params)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
  assert np.abs(image - nhwc(whole)).max() > 1e-2


def test_tiles_of_pictures(theirs, ported, quick_jit):
  """Both moments, of the same tiles as above: 28 x 18 pixels are 14 x 9 latents."""
  _, graphdef, params = ported('autoencoder', theirs)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 28, 18, 3)).astype(np.float32)
  whole = theirs.encode(nchw(images)).latent_dist
  theirs.enable_tiling()
  tiled = theirs.encode(nchw(images)).latent_dist
  encode = lambda params: encode_tiled(network.merge(graphdef, params), images, tile=8, overlap=2)
  mean, logvar = quick_jit(encode)(params)
  np.testing.assert_allclose(mean, nhwc(tiled.mean), atol=1e-4)
  np.testing.assert_allclose(logvar, nhwc(tiled.logvar), atol=1e-4)
  assert np.abs(mean - nhwc(whole.mean)).max() > 1e-3


def test_slices(theirs, ported, quick_jit):
  _, graphdef, params = ported('autoencoder', theirs)
  z = np.random.default_rng(0).normal(size=(5, 4, 6, 4)).astype(np.float32)
  theirs.enable_slicing()
  decoded = theirs.decode(nchw(z)).sample
  image = quick_jit(lambda params: decode_sliced(network.merge(graphdef, params), z))(params)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
