"""Encoder and decoder that the KL and the vector-quantised autoencoders of latent diffusion share.

Rombach et al. 2022, appendix G; shape and names are those of diffusers: every norm has epsilon
1e-6, downsampling pads right and bottom only, attention has one head as wide as its channels.
"""

from typing import Any

import jax
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.attention import SpatialAttention
from diffusion_jax.models.checks import (
  MOST_EDGE,
  MOST_LAYERS,
  above_zero,
  all_positive,
  freeze_lists,
  groups_divide,
  positive,
  require,
  some_blocks,
)
from diffusion_jax.models.layers import Conv, Downsample2D, ResnetBlock2D, Upsample2D
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.models.remat import Blocks

EPSILON = 1e-6
# Whether each residual block is followed by attention.
DOWN_BLOCKS = {'DownEncoderBlock2D': False, 'AttnDownEncoderBlock2D': True}
UP_BLOCKS = {'UpDecoderBlock2D': False, 'AttnUpDecoderBlock2D': True}


def check_levels(config: Any) -> None:
  """Checks what encoder and decoder read of a config; block types left empty become the plain ones.

  Raises:
    UserError: naming the field.
  """
  freeze_lists(config)
  name = type(config).__name__
  positive(config, 'in_channels', 'out_channels', 'latent_channels', 'norm_num_groups')
  positive(config, 'layers_per_block', most=MOST_LAYERS)
  all_positive(config, 'block_out_channels')
  groups_divide(config)
  if config.sample_size is not None:
    all_positive(config, 'sample_size', most=MOST_EDGE)
  above_zero(config, 'scaling_factor')
  levels = len(config.block_out_channels)
  some_blocks(config, 2 * levels * config.layers_per_block)
  for field, known in (('down_block_types', DOWN_BLOCKS), ('up_block_types', UP_BLOCKS)):
    types = getattr(config, field) or (next(iter(known)),) * levels
    object.__setattr__(config, field, types)
    require(len(types) == levels,
            f'{name}.{field} must have {levels} entries, one per level, not {len(types)}.')
    for kind in types:
      require(kind in known, f'{name}.{field} has {kind!r}; use {" or ".join(known)}.')


class DownEncoderBlock2D(Blocks):
  """`layers` residual blocks, with attention after each or not; then, unless last, halving."""

  def __init__(
    self, i: int, o: int, *, layers: int, attention: bool, halve: bool, groups: int, **kw
  ):
    norm = dict(groups=groups, epsilon=EPSILON)
    self.resnets = nnx.List([
      ResnetBlock2D(i if n == 0 else o, o, **norm, **kw) for n in range(layers)
    ])
    self.attentions = nnx.List([
      SpatialAttention(o, **norm, **kw) for _ in range(layers if attention else 0)
    ])
    self.downsamplers = nnx.List([Downsample2D(o, asymmetric=True, **kw)] if halve else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (*_alternate(self.resnets, self.attentions), *self.downsamplers):
      x = self.run(layer, x)
    return x


class UpDecoderBlock2D(Blocks):
  """`layers` residual blocks, with attention after each or not; then, unless last, doubling."""

  def __init__(
    self, i: int, o: int, *, layers: int, attention: bool, double: bool, groups: int, **kw
  ):
    norm = dict(groups=groups, epsilon=EPSILON)
    self.resnets = nnx.List([
      ResnetBlock2D(i if n == 0 else o, o, **norm, **kw) for n in range(layers)
    ])
    self.attentions = nnx.List([
      SpatialAttention(o, **norm, **kw) for _ in range(layers if attention else 0)
    ])
    self.upsamplers = nnx.List([Upsample2D(o, **kw)] if double else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (*_alternate(self.resnets, self.attentions), *self.upsamplers):
      x = self.run(layer, x)
    return x


def _alternate(resnets: nnx.List, attentions: nnx.List) -> list[nnx.Module]:
  if not attentions:
    return list(resnets)
  return [layer for pair in zip(resnets, attentions, strict=True) for layer in pair]


class UNetMidBlock2D(Blocks):
  """Residual block, attention (optional), residual block: [b h w c] -> [b h w c]."""

  def __init__(self, channels: int, *, attention: bool, groups: int, **kw):
    norm = dict(groups=groups, epsilon=EPSILON)
    self.attentions = nnx.List([SpatialAttention(channels, **norm, **kw)] if attention else [])
    self.resnets = nnx.List([ResnetBlock2D(channels, channels, **norm, **kw) for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
      x = self.run(layer, x)
    return x


class Encoder(Blocks):
  """Images [b h w i] -> [b h/f w/f out_channels]."""

  def __init__(self, config: Any, out_channels: int, **kw):
    widths, groups = config.block_out_channels, config.norm_num_groups
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    self.down_blocks = nnx.List([
      DownEncoderBlock2D(
        widths[max(n - 1, 0)], width, layers=config.layers_per_block,
        attention=DOWN_BLOCKS[config.down_block_types[n]], halve=n < len(widths) - 1,
        groups=groups, **kw,
      )
      for n, width in enumerate(widths)
    ])
    self.mid_block = UNetMidBlock2D(
      widths[-1], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], out_channels, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.run_all(self._encode, x)

  def _encode(self, x: jax.Array) -> jax.Array:
    x = constrain(self.conv_in(x), 'image')
    for block in self.down_blocks:
      x = block(x)
    return self.run(self._finish, self.mid_block(x))

  def _finish(self, x: jax.Array) -> jax.Array:
    return constrain(self.conv_out(self.conv_norm_out(x, activate=True)), 'image')


class Decoder(Blocks):
  """Latents [b h/f w/f c] -> images [b h w o]; one residual block more per level than down."""

  def __init__(self, config: Any, **kw):
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    self.conv_in = Conv(config.latent_channels, widths[0], **kw)
    self.mid_block = UNetMidBlock2D(
      widths[0], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    self.up_blocks = nnx.List([
      UpDecoderBlock2D(
        widths[max(n - 1, 0)], width, layers=config.layers_per_block + 1,
        attention=UP_BLOCKS[config.up_block_types[n]], double=n < len(widths) - 1,
        groups=groups, **kw,
      )
      for n, width in enumerate(widths)
    ])
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], config.out_channels, **kw)

  def __call__(self, z: jax.Array) -> jax.Array:
    return self.run_all(self._decode, z)

  def _decode(self, z: jax.Array) -> jax.Array:
    x = self.mid_block(constrain(self.conv_in(z), 'image'))
    for block in self.up_blocks:
      x = block(x)
    return self.run(self._finish, x)

  def _finish(self, x: jax.Array) -> jax.Array:
    return constrain(self.conv_out(self.conv_norm_out(x, activate=True)), 'image')
