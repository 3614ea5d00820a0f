"""AutoencoderTiny (TAESD) against diffusers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

CONFIGS = {
  'two levels': dict(
    encoder_block_out_channels=(4, 4), decoder_block_out_channels=(6, 6),
    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
  ),
  'three levels, others than the defaults': dict(
    encoder_block_out_channels=(4,) * 3, decoder_block_out_channels=(4,) * 3,
    num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(1, 2, 1), latent_channels=6, act_fn='gelu',
    latent_magnitude=2, latent_shift=0.25, scaling_factor=1.5305, shift_factor=0.0609,
  ),
}


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.AutoencoderTiny(**CONFIGS[name]))
  config, graphdef, params = ported('autoencoder_tiny', theirs)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
  latents = theirs.encode(nchw(images)).latents * 5  # Far enough out for the tanh to matter.
  decoded = theirs.decode(latents).sample
  decoded.square().mean().backward()

  def loss(params):
    ours = network.merge(graphdef, params)
    z = ours.encode(jnp.asarray(images)) * 5
    image = ours.decode(z)
    return jnp.square(image).mean(), (z, image)

  small = name == 'two levels'
  gradients, (z, image) = quick_jit(jax.grad(loss, has_aux=True) if small else loss)(params)
  np.testing.assert_allclose(z, nhwc(latents), atol=1e-4)
  np.testing.assert_allclose(image, nhwc(decoded), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, again)
  for key, value in CONFIGS[name].items():
    found = getattr(again.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key
