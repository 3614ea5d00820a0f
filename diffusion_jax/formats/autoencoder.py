"""The autoencoders: config.json, published configs, names in a single file.

A single file has them under `first_stage_model.`, with attention as convolutions.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_jax.errors import require
from diffusion_jax.formats.published import ANY, NetworkFormat, Rule, same
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from diffusion_jax.models.vq import VQConfig, VQModel

# Autoencoders saved before diffusers 0.18 name the parts of their attention so.
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def _new_attention(name: str) -> str:
  parts = name.split('.')
  if len(parts) >= 4 and parts[-4] == 'attentions':
    parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
  return '.'.join(parts)


class _AutoencoderFormat(NetworkFormat):
  """Without what diffusers fails on: a sample_size of null, and a shift_factor of 0."""

  def describe(self, config: Any) -> dict[str, Any]:
    values = super().describe(config)
    if config.sample_size is None:
      del values['sample_size']
    if 'shift_factor' in values:
      values['shift_factor'] = config.shift_factor or None
    return values


AUTOENCODER = _AutoencoderFormat(
  AutoencoderKL, AutoencoderKLConfig, ('AutoencoderKL',), accepted={'act_fn': 'silu'},
  defaults={'block_out_channels': [64], 'layers_per_block': 1}, written={'act_fn': 'silu'},
  rename=_new_attention,
)
VQ = _AutoencoderFormat(
  VQModel, VQConfig, ('VQModel',),
  accepted={'act_fn': 'silu', 'norm_type': 'group', 'force_upcast': ANY},
  defaults={'block_out_channels': [64], 'layers_per_block': 1, 'num_vq_embeddings': 256},
  written={'act_fn': 'silu', 'norm_type': 'group'}, rename=_new_attention,
)
TINY = NetworkFormat(AutoencoderTiny, AutoencoderTinyConfig, ('AutoencoderTiny',), accepted={
  'upsample_fn': 'nearest', 'upsampling_scaling_factor': 2, 'force_upcast': ANY,
  'block_out_channels': ANY,  # A copy of decoder_block_out_channels.
})

AUTOENCODERS: dict[str, AutoencoderKLConfig | AutoencoderTinyConfig | VQConfig] = {
  'sd15': AutoencoderKLConfig(sample_size=512),
  'sd21': AutoencoderKLConfig(sample_size=768),
  'sdxl': AutoencoderKLConfig(sample_size=1024, scaling_factor=0.13025),
  'sd_x4_upscaler': AutoencoderKLConfig(
    block_out_channels=(128, 256, 512), scaling_factor=0.08333, sample_size=256
  ),
  'taesd': AutoencoderTinyConfig(),
  'vq_f4': VQConfig(sample_size=256),  # Latent diffusion's, with 8192 codes of 3 channels.
}
"""The published autoencoders by name, as their config.json describe them."""

Shapes = Mapping[str, tuple[int, ...]]

PREFIX = 'first_stage_model.'
_ATTENTION = {'to_q': 'q', 'to_k': 'k', 'to_v': 'v', 'to_out.0': 'proj_out'}


def rules(
  channels: tuple[int, ...], layers: int, *, attention: bool = True, quantised: bool = True
) -> list[Rule]:
  """All rules of an autoencoder, without the prefix.

  Args:
    channels: at each level, from the highest resolution down.
    layers: resnets at each level of the encoder; the decoder has one more.
    attention: in the middle.
    quantised: whether there are the convolutions before and after the latents.
  """
  found = []
  if quantised:
    found += [*same('quant_conv', 'quant_conv'), *same('post_quant_conv', 'post_quant_conv')]
  for half in ('encoder', 'decoder'):
    for ours, theirs in (
      ('conv_in', 'conv_in'), ('conv_norm_out', 'norm_out'), ('conv_out', 'conv_out')
    ):
      found += same(f'{half}.{ours}', f'{half}.{theirs}')
    found += _mid(half, attention)
  return [*found, *_down(channels, layers), *_up(channels, layers + 1)]


def _mid(half: str, attention: bool) -> Iterator[Rule]:
  for i in (0, 1):
    yield from _resnet(f'{half}.mid_block.resnets.{i}', f'{half}.mid.block_{i + 1}', False)
  if attention:
    ours, theirs = f'{half}.mid_block.attentions.0', f'{half}.mid.attn_1'
    yield from same(f'{ours}.group_norm', f'{theirs}.norm')
    for name, stored in _ATTENTION.items():
      yield Rule((f'{ours}.{name}.weight',), f'{theirs}.{stored}.weight', 'pointwise')
      yield from same(f'{ours}.{name}', f'{theirs}.{stored}', ['bias'])


def _down(channels: tuple[int, ...], layers: int) -> Iterator[Rule]:
  width = channels[0]
  for level, out in enumerate(channels):
    ours, theirs = f'encoder.down_blocks.{level}', f'encoder.down.{level}'
    for i in range(layers):
      yield from _resnet(f'{ours}.resnets.{i}', f'{theirs}.block.{i}', width != out)
      width = out
    if level < len(channels) - 1:
      yield from same(f'{ours}.downsamplers.0.conv', f'{theirs}.downsample.conv')


def _up(channels: tuple[int, ...], layers: int) -> Iterator[Rule]:
  width = channels[-1]
  for level, out in reversed(list(enumerate(channels))):
    ours, theirs = f'decoder.up_blocks.{len(channels) - 1 - level}', f'decoder.up.{level}'
    for i in range(layers):
      yield from _resnet(f'{ours}.resnets.{i}', f'{theirs}.block.{i}', width != out)
      width = out
    if level:
      yield from same(f'{ours}.upsamplers.0.conv', f'{theirs}.upsample.conv')


def _resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Rule]:
  for name in ('norm1', 'conv1', 'norm2', 'conv2'):
    yield from same(f'{ours}.{name}', f'{theirs}.{name}')
  if shortcut:
    yield from same(f'{ours}.conv_shortcut', f'{theirs}.nin_shortcut')


def of_config(values: Mapping[str, Any], where: str) -> list[Rule]:
  """The rules of an autoencoder by its config.json. UserError where a single file has no names."""
  kinds = {*values.get('down_block_types', ()), *values.get('up_block_types', ())}
  require(
    kinds <= {'DownEncoderBlock2D', 'UpDecoderBlock2D'},
    f'{where}: a single file has no names for blocks {sorted(kinds)}; convert to another layout.',
  )
  return rules(
    tuple(values.get('block_out_channels', (64,))), values.get('layers_per_block', 1),
    attention=values.get('mid_block_add_attention', True),
    quantised=values.get('use_quant_conv', True),
  )


def config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json of diffusers' AutoencoderKL, by the tensors without the prefix.

  What shapes do not tell, the scaling factor above all, is not in it.
  """
  require(
    'encoder.conv_in.weight' in shapes and 'decoder.conv_in.weight' in shapes,
    f'{where} holds no autoencoder; give a whole model.',
  )
  channels, layers = [], 0
  while (name := f'encoder.down.{len(channels)}.block.0.conv2.weight') in shapes:
    channels.append(shapes[name][0])
  while f'encoder.down.0.block.{layers}.conv2.weight' in shapes:
    layers += 1
  levels = len(channels)
  return {
    '_class_name': 'AutoencoderKL', 'act_fn': 'silu', 'norm_num_groups': 32,
    'in_channels': shapes['encoder.conv_in.weight'][1],
    'out_channels': shapes.get('decoder.conv_out.weight', (3,))[0],
    'latent_channels': shapes['decoder.conv_in.weight'][1],
    'block_out_channels': channels, 'layers_per_block': layers,
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
  }
