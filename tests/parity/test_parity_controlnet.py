"""ControlNet against diffusers' ControlNetModel, alone and on a U-Net, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.formats.networks import load_params, save_params
from diffusion_jax.models import network
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig, from_unet

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
from tests.parity.unet_inputs import inputs, nchw, nhwc  # noqa: E402

CROSS, PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
TINY = dict(
  layers_per_block=1, norm_num_groups=4, cross_attention_dim=6, attention_head_dim=2,
  block_out_channels=(8,),
)
TWO_LEVELS = TINY | dict(block_out_channels=(8, 16), down_block_types=(CROSS, PLAIN))
SDXL = dict(
  addition_embed_type='text_time', addition_time_embed_dim=4,
  projection_class_embeddings_input_dim=31,
)
CONFIGS = {
  'SD1': dict(TWO_LEVELS, conditioning_embedding_out_channels=(3, 5, 4)),
  'SDXL, blue first': dict(
    TINY, **SDXL, down_block_types=(CROSS,), conditioning_embedding_out_channels=(3, 5),
    use_linear_projection=True, num_class_embeds=9, controlnet_conditioning_channel_order='bgr',
  ),
  'shuffle': dict(
    TINY, down_block_types=(PLAIN,), conditioning_embedding_out_channels=(3,),
    mid_block_type='UNetMidBlock2D', global_pool_conditions=True, conditioning_channels=5,
  ),
}


def _image(config, rng, h, w):
  shape = (2, h * config.image_factor, w * config.image_factor, config.conditioning_channels)
  return rng.uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize('name', CONFIGS)
def test_residuals_gradients_and_files(
  name, tmp_path, randomized, ported, quick_jit, assert_same_gradients, assert_same_weights
):
  theirs = randomized(diffusers.ControlNetModel(**CONFIGS[name]))
  config, graphdef, params = ported('controlnet', theirs)
  rng = np.random.default_rng(0)
  (x, t, condition), (their_args, their_conditions) = inputs(config, rng, (4, 6))
  image = _image(config, rng, 4, 6)
  wanted = theirs(
    *their_args, controlnet_cond=nchw(image), conditioning_scale=0.7, return_dict=False,
    **their_conditions,
  )
  wanted = [*wanted[0], wanted[1]]
  sum(r.square().mean() for r in wanted).backward()

  condition = jax.tree.map(jnp.asarray, condition)

  def loss(params, scale):
    controlnet = network.merge(graphdef, params)
    skips, mid = controlnet(x, t, condition._replace(control=image, strength=scale))
    return sum(jnp.square(r).mean() for r in (*skips, mid)), [*skips, mid]

  small = len(config.block_out_channels) == 1
  gradients, found = quick_jit(jax.grad(loss, has_aux=True) if small else loss)(
    params, jnp.full(2, 0.7)
  )
  assert len(found) == len(wanted)
  for ours, reference in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, nhwc(reference), atol=1e-4)
  if small:
    assert_same_gradients(theirs, gradients)

  save_params(tmp_path / 'ours', config, params)
  back = diffusers.ControlNetModel.from_pretrained(tmp_path / 'ours')
  assert_same_weights(theirs, back)
  for key, value in CONFIGS[name].items():
    found = getattr(back.config, key)
    assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_a_unet_under_control(randomized, ported, quick_jit):
  theirs = randomized(diffusers.UNet2DConditionModel(
    **TWO_LEVELS, up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D')
  ))
  config, graphdef, params = ported('unet', theirs)
  rng = np.random.default_rng(1)
  args, (their_args, _) = inputs(config, rng, (4, 6))
  # The third as from a ControlNet with global_pool_conditions.
  shapes = [(4, 6, 8), (4, 6, 8), (1, 1, 8), (2, 3, 16), (2, 3, 16)]
  *skips, mid = [rng.normal(size=(2, *s)).astype(np.float32) for s in shapes]
  with torch.no_grad():
    wanted = theirs(
      *their_args, down_block_additional_residuals=[nchw(r) for r in skips],
      mid_block_additional_residual=nchw(mid),
    ).sample
  run = lambda params, skips, mid: network.merge(graphdef, params)(
    *args, (skips, mid)
  )
  found = quick_jit(run)(params, skips, mid)
  np.testing.assert_allclose(found, nhwc(wanted), atol=1e-4)


def test_a_controlnet_starts_as_the_unet_that_it_is_for(tmp_path, quick_jit):
  unet = diffusers.UNet2DConditionModel(
    **TINY, **SDXL, down_block_types=(CROSS,), up_block_types=('UpBlock2D',),
    num_class_embeds=5, only_cross_attention=True, in_channels=9,
  )
  unet.save_pretrained(tmp_path / 'unet')
  config, params = load_params('unet', tmp_path / 'unet')
  widths = (3, 5)
  control = ControlNetConfig.for_unet(config, conditioning_embedding_out_channels=widths)
  make = lambda rngs: ControlNet(control, rngs=rngs)
  fresh = quick_jit(lambda key: network.initialize(make, key))(jax.random.key(0))
  ours = from_unet(fresh, params)
  save_params(tmp_path / 'ours', control, ours)
  wanted = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
  found = diffusers.ControlNetModel.from_pretrained(tmp_path / 'ours').state_dict()
  assert wanted.state_dict().keys() == found.keys()
  new = 'controlnet_cond_embedding.'  # The one part that starts at random.
  for name, value in wanted.state_dict().items():
    if not name.startswith(new) or 'conv_out' in name:
      assert torch.equal(value, found[name]), name
  assert load_params('controlnet', tmp_path / 'ours')[0] == control
