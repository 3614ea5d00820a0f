"""UNet against diffusers' UNet2DConditionModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.io.pretrained import save_params
from diffusion_jax.models import functional

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
UP_CROSS, UP_PLAIN = 'CrossAttnUpBlock2D', 'UpBlock2D'
CONFIGS = {
  'SD1, two levels': dict(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
    attention_head_dim=4, down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS),
  ),
  'SD2, three levels': dict(
    block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4, cross_attention_dim=6,
    attention_head_dim=(1, 2, 3), use_linear_projection=True,
    down_block_types=(CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS),
  ),
  'deep, other ends': dict(
    block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=5,
    attention_head_dim=(2, 4, 1), transformer_layers_per_block=(1, 2, 1), in_channels=9,
    out_channels=3, down_block_types=(PLAIN, CROSS, PLAIN), freq_shift=1,
    up_block_types=(UP_PLAIN, UP_CROSS, UP_PLAIN),
    flip_sin_to_cos=False, norm_eps=1e-3,
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.UNet2DConditionModel(sample_size=8, **CONFIGS[name]))
  config, graphdef, params = ported('unet', theirs)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 8, 12, config.in_channels)).astype(np.float32)
  t = np.array([3, 700])
  text = rng.normal(size=(2, 5, config.cross_attention_dim)).astype(np.float32)

  nchw = torch.tensor(x.transpose(0, 3, 1, 2))
  wanted = theirs(nchw, torch.tensor(t), torch.tensor(text)).sample
  wanted.square().mean().backward()

  def loss(params):
    y = functional.merge(graphdef, params)(jnp.asarray(x), jnp.asarray(t), jnp.asarray(text))
    return jnp.square(y).mean(), y

  # Gradients take long to compile: only where the network is small.
  small = len(config.block_out_channels) == 2
  gradients, y = quick_jit(jax.grad(loss, has_aux=True) if small else loss)(params)
  np.testing.assert_allclose(y, wanted.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_a_variant_we_lack_is_refused(tmp_path):
  from diffusion_jax.errors import UserError
  from diffusion_jax.io.pretrained import load_params
  config = CONFIGS['SD1, two levels'] | dict(resnet_time_scale_shift='scale_shift')
  diffusers.UNet2DConditionModel(**config).save_pretrained(tmp_path)
  with pytest.raises(UserError, match='resnet_time_scale_shift'):
    load_params('unet', tmp_path)
