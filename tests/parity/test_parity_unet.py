"""UNet against diffusers' UNet2DConditionModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import save_params
from diffusion_jax.models import network

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
from tests.parity.unet_inputs import inputs, nhwc  # noqa: E402

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
UP_CROSS, UP_PLAIN = 'CrossAttnUpBlock2D', 'UpBlock2D'
TINY = dict(layers_per_block=1, norm_num_groups=4, cross_attention_dim=6)
CONFIGS = {
  'SD1': dict(
    TINY, block_out_channels=(8, 16), cross_attention_dim=12, attention_head_dim=4,
    down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS),
  ),
  'inpainting, other ends': dict(
    block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=5,
    attention_head_dim=(2, 4, 1), in_channels=9, out_channels=3,
    down_block_types=(PLAIN, CROSS, PLAIN), freq_shift=1,
    up_block_types=(UP_PLAIN, UP_CROSS, UP_PLAIN), use_linear_projection=True,
    flip_sin_to_cos=False, norm_eps=1e-3,
  ),
  'SDXL': dict(
    TINY, block_out_channels=(8, 16), layers_per_block=2, attention_head_dim=(1, 2),
    transformer_layers_per_block=(1, 2), use_linear_projection=True,
    down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN),
    addition_embed_type='text_time', addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=31,
  ),
  'x4 upscaler, most blocks where places are few': dict(
    TINY, block_out_channels=(8, 16), in_channels=7, attention_head_dim=2, layers_per_block=(1, 2),
    down_block_types=(CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS),
    only_cross_attention=(True, False), num_class_embeds=11, upcast_attention=True,
  ),
  'projected labels': dict(
    TINY, block_out_channels=(8,), attention_head_dim=2, down_block_types=(CROSS,),
    up_block_types=(UP_CROSS,), only_cross_attention=True, mid_block_type='UNetMidBlock2D',
    class_embed_type='projection', projection_class_embeddings_input_dim=5,
    resnet_time_scale_shift='scale_shift',
  ),
  'sinusoidal labels, no mid block, guidance': dict(
    TINY, block_out_channels=(8,), attention_head_dim=2, down_block_types=(CROSS,),
    up_block_types=(UP_PLAIN,), mid_block_type=None, class_embed_type='timestep',
    time_cond_proj_dim=7,
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.UNet2DConditionModel(sample_size=8, **CONFIGS[name]))
  config, graphdef, params = ported('unet', theirs)
  args, (their_args, their_conditions) = inputs(config, np.random.default_rng(0))
  wanted = theirs(*their_args, **their_conditions).sample
  wanted.square().mean().backward()

  def loss(params):
    y = network.merge(graphdef, params)(*jax.tree.map(jnp.asarray, args))
    return jnp.square(y).mean(), y

  # Gradients take long to compile: only where the network is small.
  small = len(config.block_out_channels) == 1
  gradients, y = quick_jit(jax.grad(loss, has_aux=True) if small else loss)(params)
  np.testing.assert_allclose(y, nhwc(wanted), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key


def _draw(rng):
  """Some config of few channels that diffusers accepts; nothing in it goes together on purpose."""
  pick = lambda *values: values[rng.integers(len(values))]
  levels = pick(1, 2)
  each = lambda *values: tuple(pick(*values) for _ in range(levels))
  config = dict(
    block_out_channels=each(4, 8, 12), norm_num_groups=pick(1, 2, 4), norm_eps=pick(1e-5, 1e-3),
    layers_per_block=1, in_channels=pick(4, 5, 8), out_channels=pick(1, 4),
    cross_attention_dim=pick(3, 8), attention_head_dim=pick(each(1, 2, 4), 2),
    transformer_layers_per_block=pick(1, each(1, 2)), use_linear_projection=pick(True, False),
    only_cross_attention=pick(True, False, each(True, False)),
    down_block_types=each(CROSS, PLAIN), up_block_types=each(UP_CROSS, UP_PLAIN),
    mid_block_type=pick('UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', None),
    resnet_time_scale_shift=pick('default', 'scale_shift'),
    flip_sin_to_cos=pick(True, False), freq_shift=pick(0, 1),
    class_embed_type=pick(None, 'timestep', 'projection'), num_class_embeds=pick(None, 5),
    projection_class_embeddings_input_dim=27, addition_time_embed_dim=4,
    addition_embed_type=pick(None, 'text_time'),
  )
  return config


@pytest.mark.parametrize('seed', range(3))
def test_any_mixture_of_options(seed, randomized, ported, quick_jit):
  rng = np.random.default_rng(seed)
  theirs = randomized(diffusers.UNet2DConditionModel(**_draw(rng)))
  config, graphdef, params = ported('unet', theirs)
  args, (their_args, their_conditions) = inputs(config, rng, (2, 4))
  run = quick_jit(lambda params: network.merge(graphdef, params)(*args))
  with torch.no_grad():
    wanted = nhwc(theirs(*their_args, **their_conditions).sample)
  np.testing.assert_allclose(run(jax.tree.map(jnp.asarray, params)), wanted, atol=1e-4)
