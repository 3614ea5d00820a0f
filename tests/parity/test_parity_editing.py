"""Convolutions that wrap around against PyTorch's, and RePaint's schedule, of diffusers."""

import numpy as np
import pytest

from diffusion_jax.diffusion.samplers.resampling import stretches
from diffusion_jax.formats.networks import network_format
from diffusion_jax.types import Condition

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')


def nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def wrapping(model):
  for module in model.modules():
    if isinstance(module, torch.nn.Conv2d):
      module.padding_mode = 'circular'
  return model


def test_a_unet_and_a_decoder_that_wrap_around(randomized, ported, quick_jit, tmp_path):
  """As people make pictures of diffusers tile: by the padding of every convolution."""
  unet = randomized(diffusers.UNet2DConditionModel(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=5,
    attention_head_dim=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
  ))
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, text, t = draw(2, 8, 12, 4), draw(2, 3, 5), np.array([3, 400])
  config, _, params = ported('unet', unet)
  with torch.no_grad():
    plain = unet(nchw(x), torch.tensor(t), torch.tensor(text)).sample
    wanted = wrapping(unet)(nchw(x), torch.tensor(t), torch.tensor(text)).sample
  ours = network_format('unet').network(config, tiling='both')
  found = quick_jit(lambda params: ours.bind(params)(x, t, Condition(text)))(params)
  np.testing.assert_allclose(nchw(found), wanted, atol=1e-4)
  assert (wanted - plain).abs().max() > 1e-2

  vae = randomized(diffusers.AutoencoderKL(
    down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16,
  ))
  config, _, params = ported('autoencoder', vae)
  with torch.no_grad():
    wanted = wrapping(vae).decode(nchw(x)).sample
  ours = network_format('autoencoder').network(config, tiling='both')
  found = quick_jit(lambda params: ours.bind(params).decode(x))(params)
  np.testing.assert_allclose(nchw(found), wanted, atol=1e-4)


@pytest.mark.parametrize(('steps', 'jump', 'repeats'), [(12, 3, 4), (10, 4, 2), (9, 1, 3)])
def test_stretches_are_those_of_the_published_schedule(steps, jump, repeats):
  scheduler = diffusers.RePaintScheduler(num_train_timesteps=steps)
  scheduler.set_timesteps(steps, jump, repeats)
  left = np.arange(steps, -1, -1)
  visited, at = [], steps
  for stretch, _ in stretches((left, left), jump, repeats):
    visited += [*range(at + 1, stretch[0] + 1), *stretch[1:]]
    at = stretch[-1]
  assert visited == scheduler.timesteps.tolist()
