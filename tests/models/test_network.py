"""Shapes, sizes, gradients and types of the networks; what is alike is traced once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.errors import UserError
from diffusion_jax.formats.unet import CONTROLNETS, UNETS
from diffusion_jax.models import attention, network
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig, from_unet
from diffusion_jax.models.layers import Conv, Linear, timestep_embedding
from diffusion_jax.models.network import Blocks, Compute
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.models.perceptual import Discriminator, DiscriminatorConfig
from diffusion_jax.models.text.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.types import Condition


@pytest.mark.parametrize(('module', 'config', 'scalars', 'tensors'), [
  (UNet, UNETS['sd15'], 859_520_964, 686),
  (UNet, UNETS['sd15_inpaint'], 859_535_364, 686),
  (UNet, UNETS['sd21'], 865_910_724, 686),
  (UNet, UNETS['sd_x4_upscaler'], 473_398_020, 687),
  (UNet, UNETS['sdxl'], 2_567_463_684, 1680),
  (UNet, UNETS['sdxl_refiner'], 2_259_526_660, 1220),
  (UNet, UNETS['lcm_sd15'], 859_602_884, 687),
  (ControlNet, CONTROLNETS['sd15'], 361_279_120, 340),
  (ControlNet, CONTROLNETS['sdxl'], 1_251_014_160, 844),
  (AutoencoderKL, AutoencoderKLConfig(), 83_653_863, 248),
])
def test_published_sizes(module, config, scalars, tensors):
  _, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  assert (network.count(shapes), len(shapes)) == (scalars, tensors)


def test_a_network_is_traced_once_for_the_shapes_and_the_program_of_its_parameters():
  made = []

  def layer(config, compute, rngs):
    made.append(config)
    return Linear(*config, rngs=rngs)

  made_of = network.Network.of(layer, (2, 3))
  start = len(made)
  for _ in range(2):
    shapes = jax.eval_shape(made_of.initialize, jax.random.key(0))
  jax.jit(lambda key: made_of.initialize(key)).lower(jax.random.key(0))
  assert len(made) == start + 1 and shapes['kernel'].shape == (2, 3)


TINY_UNET = UNetConfig(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
  attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
)
# Of all that a network can be conditioned on, in one level.
TINY_CONTROLNET = ControlNetConfig(
  block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
  attention_head_dim=2, down_block_types=('CrossAttnDownBlock2D',), num_class_embeds=5,
  addition_embed_type='text_time', addition_time_embed_dim=4,
  projection_class_embeddings_input_dim=27, conditioning_embedding_out_channels=(3, 5),
)
TINY_AUTOENCODER = AutoencoderKLConfig(
  block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2
)
TOWER = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
TINY_CLIP = CLIPConfig(
  CLIPTextConfig(**TOWER, vocab_size=20, max_position_embeddings=5, eos_token_id=1),
  CLIPVisionConfig(**TOWER, image_size=8, patch_size=4), projection_dim=6,
)
TINY_DISCRIMINATOR = DiscriminatorConfig(base_channels=4, n_layers=2, norm_num_groups=2)


def _unet(net, key):
  x, text = jax.random.normal(key, (2, 4, 6, 4)), jax.random.normal(key, (2, 3, 6))
  y = net(x, jnp.array([3, 500]), Condition(text))
  assert y.shape == x.shape
  return y


def _called(net, shape=(1, 4, 4, 4), residuals=None, **condition):
  condition = {'text': jnp.ones((1, 3, 6)), **condition}
  return net(jnp.ones(shape), jnp.ones(1), Condition(**condition), residuals)


def _controlled(net, **changes):
  inputs = dict(
    text=jnp.ones((2, 3, 6)), control=jnp.ones((2, 8, 12, 3)), pooled=jnp.ones((2, 3)),
    sizes=jnp.ones((2, 6)), labels=jnp.array([1, 4]),
  ) | changes
  x = inputs.pop('x', jnp.ones((2, 4, 6, 4)))
  return net(x, jnp.array([3, 500]), Condition(**inputs))


def _controlnet(net, key):
  draw = lambda *shape: jax.random.normal(key, shape)
  skips, mid = _controlled(
    net, x=draw(2, 4, 6, 4), text=draw(2, 3, 6), control=jax.random.uniform(key, (2, 8, 12, 3))
  )
  assert [y.shape for y in (*skips, mid)] == [(2, 4, 6, 8)] * 3
  return jnp.stack([*skips, mid])


def _autoencoder(net, key):
  mean, logvar = net.encode(jax.random.uniform(key, (2, 8, 12, 3), minval=-1))
  assert mean.shape == logvar.shape == (2, 4, 6, 4)
  image = net.decode(mean)
  assert image.shape == (2, 8, 12, 3)
  return jnp.concatenate([image.ravel(), logvar.ravel()])


def _clip(net, key):
  hidden, text = net.encode_text(jnp.array([[0, 5, 6, 1, 1], [0, 7, 8, 9, 1]]))
  image = net.encode_image(jax.random.normal(key, (2, 8, 8, 3)))
  assert hidden.shape == (2, 5, 8) and text.shape == image.shape == (2, 6)
  return jnp.exp(net.logit_scale[...]).astype(text.dtype) * image @ text.T


def _discriminator(net, key):
  logits = net(jax.random.normal(key, (2, 16, 20, 3)))
  assert logits.shape == (2, 2, 3, 1)
  return logits


NETWORKS = {
  'unet': (UNet, TINY_UNET, _unet),
  'controlnet': (ControlNet, TINY_CONTROLNET, _controlnet),
  'autoencoder': (AutoencoderKL, TINY_AUTOENCODER, _autoencoder),
  'clip': (CLIP, TINY_CLIP, _clip),
  'discriminator': (Discriminator, TINY_DISCRIMINATOR, _discriminator),
}
# A bias of all keys shifts each row of attention logits by a constant, which softmax forgets.
NO_EFFECT = ('.to_k.bias', '.k_proj.bias')


@pytest.mark.parametrize('name', NETWORKS)
def test_gradient_reaches_every_parameter_and_bfloat16_computes(name, quick_jit, random_params):
  module, config, run = NETWORKS[name]
  key = jax.random.key(0)
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  params = random_params(shapes)

  def loss(params):
    y = run(network.merge(graphdef, params), key)
    weights = jax.random.normal(key, y.shape)  # A plain mean would be blind to what norms undo.
    return jnp.mean(y * weights), y

  gradients, full = quick_jit(jax.grad(loss, has_aux=True))(params)
  for leaf, gradient in gradients.items():
    # Relative to the output: rounding noise, where the true gradient is zero, is far smaller.
    floor = 1e-7 * float(jnp.abs(full).mean())
    assert leaf.endswith(NO_EFFECT) or np.abs(gradient).max() > floor, leaf

  make = lambda rngs: module(config, compute=Compute(jnp.bfloat16), rngs=rngs)
  graphdef, shapes = network.abstract(make)
  assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype('float32')}
  half = quick_jit(lambda params: run(network.merge(graphdef, params), key))(params)
  assert full.dtype == jnp.float32 and half.dtype == jnp.bfloat16
  error = jnp.sqrt(jnp.square(full - half.astype(jnp.float32)).mean() / jnp.square(full).mean())
  assert 0 < float(error) < 0.1


def test_timestep_embedding_has_the_known_values():
  t = jnp.array([0.0, 1.0, 999.0])
  embedding = timestep_embedding(t, 4)
  wanted = [[np.cos(a), np.cos(a / 100), np.sin(a), np.sin(a / 100)] for a in (0, 1, 999)]
  np.testing.assert_allclose(embedding, wanted, atol=1e-4)
  sines_first = timestep_embedding(t, 4, flip_sin_to_cos=False)
  np.testing.assert_allclose(sines_first, np.roll(embedding, 2, axis=1))
  shifted = timestep_embedding(jnp.array([1.0]), 4, freq_shift=1)  # Frequencies 1 and 1/10000.
  np.testing.assert_allclose(shifted[0, 1], np.cos(1e-4), atol=1e-6)
  assert timestep_embedding(t, 5).shape == (3, 5)


@pytest.mark.parametrize('offset', [0.0, 3000.0])
def test_group_norm_holds_with_a_large_mean(offset, quick_jit):
  from flax import nnx
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6)) + offset
  norm = GroupNorm(3, 6, 1e-5, rngs=nnx.Rngs(0))
  groups = np.asarray(x, np.float64).reshape(2, 16, 3, 2)
  mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  wanted = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
  np.testing.assert_allclose(quick_jit(norm)(x), wanted, atol=1e-5)
  weights = jax.random.normal(jax.random.key(1), x.shape)

  def plain(x):
    y = x.reshape(2, 16, 3, 2)
    y = (y - y.mean((1, 3), keepdims=True)) / jnp.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    return (y.reshape(x.shape) * weights).sum()

  found = quick_jit(jax.grad(lambda x: (norm(x) * weights).sum()))(x)
  expected = quick_jit(jax.grad(plain))(x - offset)
  np.testing.assert_allclose(found, expected, atol=1e-4 if offset == 0 else 1e-3)


def test_tiling_convolution_is_the_convolution():
  from flax import nnx
  conv = Conv(3, 5, 4, stride=4, padding=0, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
  wanted = jax.lax.conv_general_dilated(
    x, conv.kernel[...], (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  np.testing.assert_allclose(conv(x), wanted, atol=1e-5)


@pytest.mark.parametrize(('make', 'words'), [
  (lambda: UNetConfig(block_out_channels=(320, 640)), 'down_block_types is .* must have 2 entries'),
  (lambda: UNetConfig(attention_head_dim=(8, 8)), 'attention_head_dim is .* must have 4 entries'),
  (lambda: UNetConfig(attention_head_dim=7), '7 heads do not divide 320'),
  (lambda: UNetConfig(norm_num_groups=48), '320, 640, .* multiples of norm_num_groups=48'),
  (lambda: UNetConfig(up_block_types=('UpBlock3D',) * 4), r"\[0\] is 'UpBlock3D'; choose one of"),
  (lambda: UNetConfig(layers_per_block=0), 'layers_per_block is 0; give a number from 1 to 512'),
  (lambda: UNetConfig(only_cross_attention=(True,)), 'only_cross_attention is .* 4 entries'),
  (lambda: UNetConfig(only_cross_attention=1), 'only_cross_attention is 1, a int; it must be bool'),
  (lambda: UNetConfig(mid_block_type='Mid'), "mid_block_type is 'Mid'; choose one of UNetMid"),
  (lambda: UNetConfig(class_embed_type='projection'), 'projection_.*_input_dim is None'),
  (lambda: UNetConfig(addition_embed_type='text_time', projection_class_embeddings_input_dim=9),
   'addition_time_embed_dim is None; it must be a number'),
  (lambda: UNetConfig(block_out_channels=(2**21,) * 4), 'is 2097152; give a number from 1 to'),
  (lambda: UNetConfig(norm_eps=float('nan')), 'norm_eps is nan; give a number from above 0 to 1'),
  (lambda: ControlNetConfig(mid_block_type=None), 'ControlNetConfig.mid_block_type is None'),
  (lambda: AutoencoderKLConfig(block_out_channels=()), 'has a length of 0; give 1 to 12'),
  (lambda: AutoencoderKLConfig(scaling_factor=0.0), 'scaling_factor is 0.0; give a'),
  (lambda: AutoencoderKLConfig(layers_per_block=500), 'describes 4,000 blocks'),
  (lambda: CLIPTextConfig(hidden_size=500), 'num_attention_heads is 8; .* divide hidden_size=500'),
  (lambda: CLIPTextConfig(hidden_act='relu'), "hidden_act is 'relu'"),
  (lambda: CLIPVisionConfig(patch_size=30), 'multiple of patch_size=30'),
  (lambda: DiscriminatorConfig(base_channels=5, norm_num_groups=4), 'must divide twice'),
])
def test_wrong_configs_say_what_is_wrong(make, words):
  with pytest.raises(UserError, match=words):
    make()


def test_lists_in_configs_become_tuples():
  assert AutoencoderKLConfig(block_out_channels=[64, 64]).block_out_channels == (64, 64)


@pytest.mark.parametrize(('name', 'call', 'words'), [
  ('unet', lambda n: _called(n, (1, 5, 4, 4)), 'multiples of 2; the nearest such size is 4x4'),
  ('unet', lambda n: _called(n, (1, 4, 4, 3)), '4 channels'),
  ('unet', lambda n: _called(n, text=jnp.ones((1, 3, 7))), r'shape \[1 n 6\]'),
  ('unet', lambda n: _called(n, (2, 4, 4, 4), text=jnp.ones((2, 3, 6))), 'times'),
  ('unet', lambda n: _called(n, labels=jnp.ones(1)), 'UNet takes no `labels`'),
  ('unet', lambda n: _called(n, pooled=jnp.ones((1, 3))), 'UNet takes no `pooled`'),
  ('unet', lambda n: _called(n, residuals=([jnp.ones((1, 4, 4, 8))], jnp.ones((1, 2, 2, 16)))),
   'must hold 4 arrays .* not 1'),
  ('unet', lambda n: _called(n, residuals=([jnp.ones((1, 4, 4, 8))] * 4, jnp.ones((1, 2, 2, 16)))),
   r'Residual 2 has shape \[1, 4, 4, 8\], but must have \[1, 2, 2, 8\]'),
  ('controlnet', lambda n: _controlled(n, sizes=None), 'needs `sizes`'),
  ('controlnet', lambda n: _controlled(n, labels=None), 'needs `labels`'),
  ('controlnet', lambda n: _controlled(n, labels=jnp.ones(2)), r'whole numbers in \[0, 5\)'),
  ('controlnet', lambda n: _controlled(n, labels=jnp.ones((2, 1), int)), r'shape \[2\]'),
  ('controlnet', lambda n: _controlled(n, pooled=jnp.ones((2, 4))), r'p \+ 4 n = 27'),
  ('controlnet', lambda n: _controlled(n, control=jnp.ones((2, 4, 6, 3))), r'\[2, 8, 12, 3\]'),
  ('autoencoder', lambda n: n.encode(jnp.ones((1, 8, 7, 3))), '8x7 .* multiples of 2'),
  ('clip', lambda n: n.encode_text(jnp.ones((1, 6), int)), 'l <= 5'),
  ('clip', lambda n: n.encode_image(jnp.ones((1, 12, 12, 3))), 'resize'),
  ('discriminator', lambda n: n(jnp.ones((1, 8, 16, 3))), 'at least 12x12'),
])
def test_wrong_inputs_say_what_is_wrong(name, call, words):
  module, config, _ = NETWORKS[name]
  graphdef, shapes = network.abstract(lambda rngs: module(config, rngs=rngs))
  with pytest.raises(UserError, match=words):
    jax.eval_shape(lambda params: call(network.merge(graphdef, params)), shapes)


def test_fresh_parameters_have_the_spread_of_the_references():
  make = lambda rngs: attention.Transformer2DModel(
    8, heads=2, depth=1, context_features=64, groups=4, linear_projection=True, rngs=rngs
  )
  params = network.initialize(make, jax.random.key(0))
  kernel = params['transformer_blocks.0.attn2.to_k.kernel']  # Uniform in +-1/sqrt(64).
  assert 0.12 < float(jnp.abs(kernel).max()) <= 0.125
  assert float(jnp.abs(params['proj_in.bias']).max()) == 0
  assert float(params['norm.scale'].min()) == 1


def test_a_fresh_controlnet_changes_nothing(quick_jit):
  config = dataclasses.replace(
    TINY_CONTROLNET, down_block_types=('DownBlock2D',), mid_block_type='UNetMidBlock2D'
  )
  run = lambda rngs: _controlnet(ControlNet(config, rngs=rngs), jax.random.key(1))
  residuals = quick_jit(lambda key: run(network.Keys(key)))(jax.random.key(0))
  assert float(jnp.abs(residuals).max()) == 0


def test_a_controlnet_of_another_shape_takes_no_parameters_from_a_unet():
  shapes = lambda module, config: network.abstract(lambda rngs: module(config, rngs=rngs))[1]
  control = shapes(ControlNet, ControlNetConfig.for_unet(TINY_UNET))
  unet = shapes(UNet, TINY_UNET)
  assert from_unet(control, unet)['mid_block.resnets.0.conv1.bias'].shape == (16,)
  with pytest.raises(UserError, match=r'conv_in.kernel is \[3, 3, 4, 8\] .* \[3, 3, 9, 8\]'):
    from_unet(control, shapes(UNet, dataclasses.replace(TINY_UNET, in_channels=9)))
  with pytest.raises(UserError, match=r'add_embedding\.linear_1.* missing in the U-Net'):
    from_unet(shapes(ControlNet, TINY_CONTROLNET), unet)


def test_text_is_causal_and_padding_counts(random_params):
  graphdef, shapes = network.abstract(lambda rngs: CLIP(TINY_CLIP, rngs=rngs))
  clip = network.merge(graphdef, random_params(shapes))
  a, b = (clip.encode_text(jnp.array([[0, 5, end, 1, 1]]))[0][0] for end in (6, 7))
  np.testing.assert_array_equal(a[:2], b[:2])
  assert np.abs(a[3:] - b[3:]).max() > 1e-6


TRACED = []


class Layer(nnx.Module):
  """Writes down each time that it is traced."""

  def __init__(self, i, o, rngs):
    self.dense = Linear(i, o, rngs=rngs)

  def __call__(self, x):
    TRACED.append(x.shape)
    return jnp.tanh(self.dense(x))


class Stack(Blocks):
  """Five layers, of which four are alike."""

  def __init__(self, remat):
    rngs = nnx.Rngs(0)
    self.layers = nnx.List([Layer(3, 4, rngs), *[Layer(4, 4, rngs) for _ in range(4)]])
    self.remat = remat

  def __call__(self, x):
    for layer in self.layers:
      x = self.run(layer, x)
    return x


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_alike_is_traced_once_and_computed_each_on_its_own(remat):
  jax.clear_caches()
  TRACED.clear()
  stack, x = Stack(remat), np.ones((2, 3), np.float32)
  kernels = [np.asarray(layer.dense.kernel[...]) for layer in stack.layers]
  found = jax.jit(jax.value_and_grad(lambda x: stack(x).sum()))(x)
  assert TRACED == [(2, 3), (2, 4)]
  y, passed = x, []
  for kernel in kernels:
    y = np.tanh(y @ kernel)
    passed.append(y)
  slope = np.ones_like(y)
  for kernel, y in zip(reversed(kernels), reversed(passed), strict=True):
    slope = slope * (1 - y**2) @ kernel.T
  np.testing.assert_allclose(found[0], passed[-1].sum(), rtol=1e-5)
  np.testing.assert_allclose(found[1], slope, rtol=1e-4)


def test_equal_networks_are_traced_once_and_others_are_their_own():
  of = lambda width, **compute: network.Network.of(
    AutoencoderKL, AutoencoderKLConfig(block_out_channels=(width,)), **compute
  )
  assert of(32).make is of(32).make and of(32).shapes is of(32).shapes
  assert of(64).config.block_out_channels == (64,) and of(64).shapes != of(32).shapes
  half = of(32, param_dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in half.shapes.values()} == {jnp.dtype(jnp.bfloat16)}
