"""The U-Net and the ControlNet: config.json, published configs, names in a single file.

A single file numbers its blocks through: input_blocks.0 is the first convolution, then each level
has its layers and, but for the last level, a downsampling; output_blocks count the layers upwards,
one more at each level, and a level's last block also holds its upsampling.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.published import ANY, NetworkFormat, Rule, same
from diffusion_jax.models.controlnet import ControlNet, ControlNetConfig
from diffusion_jax.models.unet import UNet, UNetConfig

_BOTH = {
  'act_fn': 'silu', 'downsample_padding': 1, 'mid_block_scale_factor': 1,
  'addition_embed_type_num_heads': ANY,
}
_UNET = _BOTH | {
  'center_input_sample': False, 'dropout': 0.0, 'dual_cross_attention': False,
  'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1.0, 'conv_in_kernel': 3,
  'conv_out_kernel': 3, 'time_embedding_type': 'positional', 'attention_type': 'default',
  'class_embeddings_concat': False,
  'mid_block_only_cross_attention': ANY,  # Of a mid block that we refuse.
}


class _UNetFormat(NetworkFormat):
  """Null for false, as diffusers takes it; of a ControlNet, num_attention_heads comes first."""

  def parse(self, values: Mapping[str, Any], where: str) -> Any:
    values = dict(values)
    if values.get('upcast_attention') is None:
      values['upcast_attention'] = False
    if self.module is ControlNet and (heads := values.pop('num_attention_heads', None)) is not None:
      values['attention_head_dim'] = heads
    return super().parse(values, where)


UNET = _UNetFormat(
  UNet, UNetConfig, ('UNet2DConditionModel',), accepted=_UNET,
  defaults={'sample_size': None, 'cross_attention_dim': 1280}, written={'act_fn': 'silu'},
)
CONTROLNET = _UNetFormat(
  ControlNet, ControlNetConfig, ('ControlNetModel',), accepted=_BOTH,
  defaults={'cross_attention_dim': 1280}, written={'act_fn': 'silu'},
)


_CROSS, _PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
_UP_CROSS, _UP_PLAIN = 'CrossAttnUpBlock2D', 'UpBlock2D'
_SD2 = dict(
  cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)

UNETS: dict[str, UNetConfig] = {
  'sd15': UNetConfig(),
  # Latents, mask, and latents of the masked image.
  'sd15_inpaint': UNetConfig(in_channels=9),
  # Latents and those of the image to edit.
  'instruct_pix2pix': UNetConfig(in_channels=8),
  'sd21_base': UNetConfig(**_SD2),
  'sd21': UNetConfig(**_SD2, sample_size=96, upcast_attention=True),
  # Latents and depth.
  'sd2_depth': UNetConfig(**_SD2, in_channels=5),
  # Latents and the small image; the label is the noise level of the latter.
  'sd_x4_upscaler': UNetConfig(
    in_channels=7, sample_size=128, block_out_channels=(256, 512, 512, 1024),
    down_block_types=(_PLAIN, _CROSS, _CROSS, _CROSS),
    up_block_types=(_UP_CROSS, _UP_CROSS, _UP_CROSS, _UP_PLAIN),
    cross_attention_dim=1024, only_cross_attention=(True, True, True, False),
    num_class_embeds=1000, use_linear_projection=True,
  ),
  'sdxl': UNetConfig(
    sample_size=128, block_out_channels=(320, 640, 1280),
    down_block_types=(_PLAIN, _CROSS, _CROSS), up_block_types=(_UP_CROSS, _UP_CROSS, _UP_PLAIN),
    cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    addition_embed_type='text_time', addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
  ),
}
"""The published U-Nets by name, as their config.json describe them."""

CONTROLNETS: dict[str, ControlNetConfig] = {
  name: ControlNetConfig.for_unet(UNETS[name]) for name in ('sd15', 'sdxl')
}


Shapes = Mapping[str, tuple[int, ...]]

PREFIX = 'model.diffusion_model.'
RESNET = {
  'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1',
  'norm2': 'out_layers.0', 'conv2': 'out_layers.3',
}
SHORTCUT = {'conv_shortcut': 'skip_connection'}
ENDS = {
  'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
  'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
}
MLP = {'linear_1': 'label_emb.0.0', 'linear_2': 'label_emb.0.2'}
_BIASED = ('norm1', 'norm2', 'norm3', 'attn1.to_out.0', 'attn2.to_out.0', 'ff.net.0.proj',
           'ff.net.2')
_UNBIASED = tuple(f'attn{i}.to_{part}' for i in (1, 2) for part in 'qkv')


@dataclasses.dataclass(frozen=True)
class Structure:
  """What decides the names of a U-Net.

  depths: transformer blocks per attention at each level, 0 without attention; that of the mid block
  is mid_depth. labels: 'add_embedding' or 'class_embedding', MLPs over sizes or labels,
  'class_table', a table of labels, or None.
  """

  channels: tuple[int, ...]
  layers: tuple[int, ...]
  depths: tuple[int, ...]
  mid_depth: int
  labels: str | None = None


def rules(structure: Structure) -> list[Rule]:
  """All rules of a U-Net, without the prefix."""
  found = [rule for ours, theirs in ENDS.items() for rule in same(ours, theirs)]
  for block in (_labels, _down, _mid, _up):
    found += block(structure)
  return found


def _labels(structure: Structure) -> Iterator[Rule]:
  if structure.labels == 'class_table':
    yield from same('class_embedding', 'label_emb', ['weight'])
  elif structure.labels:
    for ours, theirs in MLP.items():
      yield from same(f'{structure.labels}.{ours}', theirs)


def _down(structure: Structure) -> Iterator[Rule]:
  block, width, last = 1, structure.channels[0], len(structure.channels) - 1
  for level, channels in enumerate(structure.channels):
    for layer in range(structure.layers[level]):
      ours = f'down_blocks.{level}'
      yield from _resnet(f'{ours}.resnets.{layer}', f'input_blocks.{block}.0', width != channels)
      yield from _attention(
        f'{ours}.attentions.{layer}', f'input_blocks.{block}.1', structure.depths[level]
      )
      width, block = channels, block + 1
    if level < last:
      yield from same(f'down_blocks.{level}.downsamplers.0.conv', f'input_blocks.{block}.0.op')
      block += 1


def _mid(structure: Structure) -> Iterator[Rule]:
  yield from _resnet('mid_block.resnets.0', 'middle_block.0', False)
  yield from _attention('mid_block.attentions.0', 'middle_block.1', structure.mid_depth)
  yield from _resnet('mid_block.resnets.1', 'middle_block.2', False)


def _up(structure: Structure) -> Iterator[Rule]:
  block, width = 0, structure.channels[-1]
  skips = _skips(structure)
  for level, channels in reversed(list(enumerate(structure.channels))):
    ours, depth = f'up_blocks.{len(structure.channels) - 1 - level}', structure.depths[level]
    for layer in range(structure.layers[level] + 1):
      theirs = f'output_blocks.{block}'
      wide = width + skips.pop() != channels
      yield from _resnet(f'{ours}.resnets.{layer}', f'{theirs}.0', wide)
      yield from _attention(f'{ours}.attentions.{layer}', f'{theirs}.1', depth)
      width, block = channels, block + 1
    if level:
      yield from same(f'{ours}.upsamplers.0.conv', f'{theirs}.{2 if depth else 1}.conv')


def _skips(structure: Structure) -> list[int]:
  """Channels of the states that the way up takes from its end."""
  skips = [structure.channels[0]]
  for level, channels in enumerate(structure.channels):
    skips += [channels] * (structure.layers[level] + (level < len(structure.channels) - 1))
  return skips


def _resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Rule]:
  for name, stored in (RESNET | (SHORTCUT if shortcut else {})).items():
    yield from same(f'{ours}.{name}', f'{theirs}.{stored}')


def _attention(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
  if not depth:
    return
  for name in ('norm', 'proj_in', 'proj_out'):
    yield from same(f'{ours}.{name}', f'{theirs}.{name}')
  for block in (f'transformer_blocks.{i}' for i in range(depth)):
    for name in _BIASED:
      yield from same(f'{ours}.{block}.{name}', f'{theirs}.{block}.{name}')
    for name in _UNBIASED:
      yield from same(f'{ours}.{block}.{name}', f'{theirs}.{block}.{name}', ['weight'])


def of_config(values: Mapping[str, Any], where: str) -> Structure:
  """The structure of a U-Net by its config.json. UserError where a single file has no names."""
  channels = tuple(values['block_out_channels'])
  each = lambda value: tuple(value) if isinstance(value, list | tuple) else (value,) * len(channels)
  down, up = values['down_block_types'], values['up_block_types']
  crossed = [kind.startswith('CrossAttn') for kind in down]
  depths = each(values.get('transformer_layers_per_block') or 1)
  mid = values.get('mid_block_type', 'UNetMidBlock2DCrossAttn')
  known = {'CrossAttnDownBlock2D', 'DownBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'}
  require(
    {*down, *up} <= known
    and crossed == [kind.startswith('CrossAttn') for kind in up][::-1]
    and mid == 'UNetMidBlock2DCrossAttn',
    f'{where}: a single file has no names for its blocks (down {down}, mid {mid}, up {up}); '
    'convert to another layout.',
  )
  return Structure(
    channels, each(values.get('layers_per_block', 2)),
    tuple(depth * cross for depth, cross in zip(depths, crossed, strict=True)),
    depths[-1], _label_kind(values, where),
  )


def _label_kind(values: Mapping[str, Any], where: str) -> str | None:
  added, classes = values.get('addition_embed_type'), values.get('class_embed_type')
  if added == 'text_time' and classes is None:
    return 'add_embedding'
  if added is None and classes in ('timestep', 'projection'):
    return 'class_embedding'
  require(
    added is None and classes is None,
    f'{where}: a single file has no names for addition_embed_type={added!r} with class_embed_type='
    f'{classes!r}; convert to another layout.',
  )
  return 'class_table' if values.get('num_class_embeds') else None


def of_shapes(shapes: Shapes, where: str, labels_are_sizes: bool) -> Structure:
  """The structure of a U-Net by its tensors in a single file, without the prefix.

  labels_are_sizes: whether an MLP over labels is Stable Diffusion XL's.
  """
  depths = _depths(shapes)
  channels, layers, level_depths = [], [0], [0]
  block = 1
  while any(name.startswith(f'input_blocks.{block}.') for name in shapes):
    if f'input_blocks.{block}.0.op.weight' in shapes:
      layers, level_depths = [*layers, 0], [*level_depths, 0]
    else:
      layers[-1] += 1
      level_depths[-1] = depths.get(f'input_blocks.{block}', 0)
      channels[len(layers) - 1 :] = [_get(shapes, f'input_blocks.{block}.0.out_layers.3', where)[0]]
    block += 1
  require(
    len(channels) == len(layers),
    f'{where} holds no U-Net of Stable Diffusion; check that it is a whole model.',
  )
  labels = None
  if 'label_emb.weight' in shapes:
    labels = 'class_table'
  elif 'label_emb.0.0.weight' in shapes:
    labels = 'add_embedding' if labels_are_sizes else 'class_embedding'
  return Structure(
    tuple(channels), tuple(layers), tuple(level_depths), depths.get('middle_block', 0), labels
  )


def _depths(shapes: Shapes) -> dict[str, int]:
  """Transformer blocks of each block that has attention."""
  depths: dict[str, int] = {}
  for name in shapes:
    if found := re.match(r'(.+)\.1\.transformer_blocks\.(\d{1,4})\.norm1\.weight$', name):
      depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
  return depths


def _get(shapes: Shapes, module: str, where: str) -> tuple[int, ...]:
  name = f'{module}.weight'
  if name not in shapes:
    raise UserError(f'{where} lacks {PREFIX}{name}; fetch it again.')
  return tuple(shapes[name])


def config(
  structure: Structure, shapes: Shapes, where: str, *, heads: int | None, pooled: int | None
) -> dict[str, Any]:
  """config.json of diffusers' UNet2DConditionModel.

  Args:
    heads: number at every level; None for one head for every 64 channels.
    pooled: width of the pooled text that sizes are added to, of Stable Diffusion XL.
  """
  down = ['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in structure.depths]
  up = ['CrossAttnUpBlock2D' if depth else 'UpBlock2D' for depth in structure.depths[::-1]]
  same_layers = len(set(structure.layers)) == 1
  # The middle has the depth of the last level, whether that has attention or not.
  depths = [depth or 1 for depth in structure.depths[:-1]] + [structure.mid_depth]
  require(
    structure.mid_depth > 0 and structure.depths[-1] in (0, structure.mid_depth),
    f'{where}: the attention in the middle of its U-Net is not of the depth of its last level.',
  )
  values = {
    '_class_name': 'UNet2DConditionModel', 'act_fn': 'silu', 'norm_num_groups': 32,
    'norm_eps': 1e-5, 'flip_sin_to_cos': True, 'freq_shift': 0, 'center_input_sample': False,
    'downsample_padding': 1, 'mid_block_scale_factor': 1,
    'in_channels': _get(shapes, 'input_blocks.0.0', where)[1],
    'out_channels': _get(shapes, 'out.2', where)[0],
    'block_out_channels': list(structure.channels), 'down_block_types': down, 'up_block_types': up,
    'layers_per_block': structure.layers[0] if same_layers else list(structure.layers),
    'transformer_layers_per_block': depths if set(depths) != {1} else 1,
    'attention_head_dim': heads or [max(1, width // 64) for width in structure.channels],
  }
  return values | _attention_config(structure, shapes, where) | _label_config(
    structure, shapes, where, pooled
  )


def _attention_config(structure: Structure, shapes: Shapes, where: str) -> dict[str, Any]:
  middle = 'middle_block.1'
  first = f'{middle}.transformer_blocks.0'
  only, block = [], 1
  for layers, channels, depth in zip(
    structure.layers, structure.channels, structure.depths, strict=True
  ):
    key = f'input_blocks.{block}.1.transformer_blocks.0.attn1.to_k'
    only.append(bool(depth) and _get(shapes, key, where)[1] != channels)
    block += layers + 1
  return {
    'cross_attention_dim': _get(shapes, f'{first}.attn2.to_k', where)[1],
    'use_linear_projection': len(_get(shapes, f'{middle}.proj_in', where)) == 2,
    'only_cross_attention': only if any(only) else False,
  }


def _label_config(
  structure: Structure, shapes: Shapes, where: str, pooled: int | None
) -> dict[str, Any]:
  if structure.labels == 'class_table':
    return {'num_class_embeds': _get(shapes, 'label_emb', where)[0]}
  if not structure.labels:
    return {}
  width = _get(shapes, 'label_emb.0.0', where)[1]
  values: dict[str, Any] = {'projection_class_embeddings_input_dim': width}
  if structure.labels == 'class_embedding':
    return values | {'class_embed_type': 'projection'}
  # Six numbers: the original size, the crop's corner, the target's size.
  return values | {
    'addition_embed_type': 'text_time', 'addition_time_embed_dim': (width - (pooled or 0)) // 6
  }
