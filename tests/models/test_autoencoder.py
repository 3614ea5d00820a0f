"""Slices and tiles: less memory, the same numbers, no seams. diffusers: tests/parity."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import load
from diffusion_jax.models import network
from diffusion_jax.models.autoencoder import (
  AutoencoderKL,
  AutoencoderKLConfig,
  decode_sliced,
  decode_tiled,
  encode_tiled,
)
from diffusion_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig

TINY = AutoencoderTinyConfig(
  encoder_block_out_channels=(4, 4), decoder_block_out_channels=(16, 16),
  num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
)


@pytest.fixture(scope='module')
def tiny(random_params):
  graphdef, shapes = network.abstract(lambda rngs: AutoencoderTiny(TINY, rngs=rngs))
  return network.merge(graphdef, random_params(shapes))


def compiled(run, *arrays):
  return jax.jit(run).lower(*arrays).compile()


def memory(program):
  return program.memory_analysis().temp_size_in_bytes


def test_slices_give_the_same_numbers_in_a_fifth_of_the_memory(tiny):
  z = jax.random.normal(jax.random.key(0), (9, 24, 24, 4))
  whole = compiled(tiny.decode, z)
  sliced = compiled(functools.partial(decode_sliced, tiny, at_once=1), z)
  np.testing.assert_allclose(sliced(z), whole(z), rtol=1e-4, atol=1e-4)
  assert memory(whole) > 5 * memory(sliced)
  # Two at a time: the last part is filled up.
  np.testing.assert_allclose(decode_sliced(tiny, z, at_once=2), whole(z), rtol=1e-4, atol=1e-4)


def test_tiles_take_a_fourth_of_the_memory(tiny):
  z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
  tiled = compiled(functools.partial(decode_tiled, tiny, tile=16, overlap=4), z)
  assert memory(compiled(tiny.decode, z)) > 4 * memory(tiled)


def test_encoding_in_tiles_takes_a_fourth_of_the_memory_for_any_height(random_params):
  """One loop in one program: twice as many tiles take hardly more."""
  config = AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2)
  graphdef, shapes = network.abstract(lambda rngs: AutoencoderKL(config, rngs=rngs))
  ours = network.merge(graphdef, random_params(shapes))
  encode = functools.partial(encode_tiled, ours, tile=16, overlap=4)
  images = lambda height: jax.ShapeDtypeStruct((1, height, 112, 3), jnp.float32)
  whole = memory(compiled(ours.encode, images(112)))
  tiled, higher = (memory(compiled(encode, images(height))) for height in (112, 208))
  assert whole > 4 * tiled and higher < 1.5 * tiled


def disks():
  """[1 48 112 3] in [-1, 1]: three disks that tiles of 64 pixels cut through."""
  y, x = np.mgrid[0:48, 0:112]
  image = np.ones((48, 112, 3), np.float32)
  for n, colour in enumerate(np.eye(3)):
    image[np.hypot(y - 24, x - 20 - 36 * n) < 16] = 2 * colour - 1
  return image[None]


def test_tiles_leave_no_seams(quick_jit):
  graphdef, params = network.split(load('autoencoder', 'asset:autoencoder-openmoji-64'))

  def run(params, images):
    ours = network.merge(graphdef, params)
    z = ours.encode(images)[0]
    whole = ours.decode(z)
    return [decode_tiled(ours, z, tile=16, overlap=n) - whole for n in (0, 4)]

  def jumps(error, step):
    """How much the error changes from one column to the next: at the seams, and usually."""
    change = np.abs(np.diff(error, axis=2)).mean((0, 1, 3))
    return change[step - 1 :: step].max(), np.median(change)

  abrupt, blended = map(np.asarray, quick_jit(run)(params, disks()))
  seam, usual = jumps(abrupt, 64)
  assert seam > 10 * usual
  seam, usual = jumps(blended, 48)
  assert seam < 1.5 * usual
  # Norms and attention see a tile alone: 3% of the range [-1, 1] in this network.
  assert 0 < np.abs(blended).mean() < 0.1


def test_what_fits_into_one_tile_is_not_cut(tiny):
  z = jax.random.normal(jax.random.key(0), (1, 4, 6, 4))
  np.testing.assert_array_equal(decode_tiled(tiny, z, tile=6, overlap=2), tiny.decode(z))


@pytest.mark.parametrize(('make', 'words'), [
  (lambda net, z: decode_tiled(net, z, tile=8, overlap=5), 'overlap=5 .* half of tile=8'),
  (lambda net, z: encode_tiled(net, z, tile=8, overlap=-1), 'overlap=-1 .* half of tile=8'),
  (lambda net, z: decode_sliced(net, z, at_once=0), 'at_once must be positive'),
])
def test_impossible_parts_are_refused(make, words, tiny):
  with pytest.raises(UserError, match=words):
    make(tiny, jnp.zeros((1, 16, 16, 4)))


@pytest.mark.parametrize('tile, overlap', [(8, 2), (8, 0), (6, 3)])
def test_tiles_of_every_size_are_the_whole(tile, overlap):
  """Of a network whose pixels depend on one place each, also where a rest of one row is left."""
  enlarge = lambda z: jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)
  local = types.SimpleNamespace(
    decode=enlarge, moments=lambda x: x[:, ::2, ::2], config=types.SimpleNamespace(factor=2),
    encode=lambda x: jnp.split(x[:, ::2, ::2], 2, -1),
  )
  for h, w in ((1, 9), (9, 1), (8, 9), (13, 14), (7, 25), (20, 15)):
    z = np.random.default_rng(h).normal(size=(2, h, w, 4)).astype(np.float32)
    tiled = decode_tiled(local, z, tile=tile, overlap=overlap)
    np.testing.assert_allclose(tiled, enlarge(z), atol=1e-6)
    moments = encode_tiled(local, enlarge(z), tile=tile, overlap=overlap)
    np.testing.assert_allclose(np.concatenate(moments, -1), z, atol=1e-6)
