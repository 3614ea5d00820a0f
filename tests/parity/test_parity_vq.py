"""VQModel against diffusers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.autoencoder import VQ
from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

CONFIGS = {
  'plain': dict(  # One level: its gradients are compiled.
    block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
    num_vq_embeddings=7,
  ),
  'attention, narrow codes': dict(
    down_block_types=('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
    up_block_types=('AttnUpDecoderBlock2D', 'UpDecoderBlock2D'), block_out_channels=(4, 8),
    layers_per_block=1, norm_num_groups=4, num_vq_embeddings=40, latent_channels=4,
    vq_embed_dim=2, mid_block_add_attention=False, lookup_from_codebook=True, sample_size=16,
    scaling_factor=0.5,
  ),
}


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def images():
  return np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


def make(name, randomized):
  """A reference whose codes are as far apart as its latents."""
  theirs = randomized(diffusers.VQModel(**CONFIGS[name]))
  with torch.no_grad():
    theirs.quantize.embedding.weight.normal_()
  return theirs


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_and_gradients(name, images, randomized, ported, quick_jit, assert_same_gradients):
  theirs = make(name, randomized)
  _, graphdef, params = ported('vq', theirs)
  latents = theirs.encode(nchw(images)).latents
  codes, commitment, (_, _, wanted) = theirs.quantize(latents)
  decoded = theirs.decode(latents).sample
  (decoded.square().mean() + commitment).backward()

  small = name == 'plain'

  def loss(params):
    ours = network.merge(graphdef, params)
    z = ours.encode(jnp.asarray(images))
    quantized, indices, commitment = ours.quantize(z)
    image = ours.decode(quantized, quantized=True)
    # Compiled for the network without gradients only.
    again = () if small else (ours.decode(z), ours.decode_indices(indices))
    total = jnp.square(image).mean() + commitment.mean()
    return total, (z, quantized, indices, commitment, image, again)

  gradients, (z, quantized, indices, losses, image, again) = quick_jit(
    jax.grad(loss, has_aux=True) if small else loss
  )(params)
  assert len(np.unique(wanted)) > 2 and losses.shape == (2,)
  np.testing.assert_array_equal(np.ravel(indices), wanted)
  np.testing.assert_allclose(z, nhwc(latents), atol=1e-4)
  np.testing.assert_allclose(quantized, nhwc(codes), atol=1e-4)
  np.testing.assert_allclose(losses.mean(), commitment.detach(), rtol=1e-5)
  for found in (image, *again):
    np.testing.assert_allclose(found, nhwc(decoded), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)


@pytest.mark.parametrize('legacy', [True, False])
def test_the_loss_weighs_one_term(legacy, randomized, ported):
  from diffusers.models.autoencoders.vae import VectorQuantizer

  theirs = VectorQuantizer(7, 3, beta=0.1, legacy=legacy)
  _, graphdef, params = ported('vq', make('plain', randomized))
  name = 'quantize.embedding.embedding'
  z = np.random.default_rng(1).normal(size=(2, 2, 3, 3)).astype(np.float32)
  with torch.no_grad():
    theirs.embedding.weight.copy_(torch.tensor(np.asarray(params[name])))
  theirs(nchw(z))[1].backward()

  def loss(codes):
    ours = network.merge(graphdef, params | {name: codes})
    return ours.quantize(jnp.asarray(z), beta=0.1, legacy=legacy)[2].mean()

  np.testing.assert_allclose(
    jax.grad(loss)(params[name]), theirs.embedding.weight.grad, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_diffusers_opens_what_we_write(name, tmp_path, randomized, ported, assert_same_weights):
  theirs = make(name, randomized)
  config, _, params = ported('vq', theirs)
  save_params(tmp_path / 'ours', config, params)
  back = diffusers.VQModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_spatial_norms_are_refused():
  with pytest.raises(UserError, match="norm_type='spatial'"):
    VQ.parse({'norm_type': 'spatial'}, 'here')
