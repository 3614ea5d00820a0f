"""The U-Net's levels: residual blocks, each with or without attention to the text after it."""

import jax
from flax import nnx

from diffusion_jax.models.attention import Transformer2DModel
from diffusion_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from diffusion_jax.models.remat import Blocks
from diffusion_jax.models.unet_config import EncoderConfig, UNetConfig


def _resnet(config: EncoderConfig, i: int, o: int, **kw) -> ResnetBlock2D:
  return ResnetBlock2D(
    i, o, groups=config.norm_num_groups, epsilon=config.norm_eps,
    time_features=config.time_features,
    scale_shift=config.resnet_time_scale_shift == 'scale_shift', **kw,
  )


def _transformer(
  config: EncoderConfig, level: int, *, only_text: bool = False, **kw
) -> Transformer2DModel:
  return Transformer2DModel(
    config.block_out_channels[level], heads=config.heads[level], depth=config.depths[level],
    context_features=config.cross_attention_dim, groups=config.norm_num_groups,
    linear_projection=config.use_linear_projection, only_text=only_text, **kw,
  )


class DownBlock(Blocks):
  """Residual blocks, each with attention after it where the level has it; then halving.

  The last level does not halve.

  x [b h w i] -> [b h/2 w/2 o] and every intermediate result, for the skip connections.
  """

  def __init__(self, config: EncoderConfig, level: int, **kw):
    widths, layers = config.block_out_channels, config.layers_per_block
    i, o = widths[max(level - 1, 0)], widths[level]
    attend = config.down_block_types[level].startswith('CrossAttn')
    self.resnets = nnx.List([_resnet(config, i if n == 0 else o, o, **kw) for n in range(layers)])
    self.attentions = nnx.List([
      _transformer(config, level, only_text=config.only_text[level], **kw)
      for _ in range(layers if attend else 0)
    ])
    last = level == len(widths) - 1
    self.downsamplers = nnx.List([] if last else [Downsample2D(o, **kw)])

  def __call__(
    self, x: jax.Array, time: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, list[jax.Array]]:
    skips = []
    for n, resnet in enumerate(self.resnets):
      x = self.run(resnet, x, time)
      x = self.attentions[n](x, text) if self.attentions else x
      skips.append(x)
    for downsample in self.downsamplers:
      x = self.run(downsample, x)
      skips.append(x)
    return x, skips


class MidBlock(Blocks):
  """Residual block, attention, residual block at the lowest resolution: [b h w c] -> [b h w c].

  'UNetMidBlock2D' is the first residual block alone.
  """

  def __init__(self, config: EncoderConfig, **kw):
    c, attend = config.block_out_channels[-1], config.mid_block_type.endswith('CrossAttn')
    level = len(config.block_out_channels) - 1
    self.attentions = nnx.List([_transformer(config, level, **kw) for _ in range(int(attend))])
    self.resnets = nnx.List([_resnet(config, c, c, **kw) for _ in range(2 if attend else 1)])

  def __call__(self, x: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
    x = self.run(self.resnets[0], x, time)
    for attention in self.attentions:
      x = self.run(self.resnets[1], attention(x, text), time)
    return x


class UpBlock(Blocks):
  """Like DownBlock, one residual block more, each fed the skip that it mirrors; then doubling.

  `step` counts from the lowest resolution; x [b h w i], skips (taken from the end) -> [b 2h 2w o].
  """

  def __init__(self, config: UNetConfig, step: int, **kw):
    widths, layers = config.block_out_channels, config.layers_per_block + 1
    level = len(widths) - 1 - step
    below, above = widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
    o = widths[level]
    attend = config.up_block_types[step].startswith('CrossAttn')
    # The last skip of a level is the result of the level above it, after halving.
    skips = [o] * (layers - 1) + [above]
    self.resnets = nnx.List([
      _resnet(config, (below if n == 0 else o) + skip, o, **kw) for n, skip in enumerate(skips)
    ])
    self.attentions = nnx.List([
      _transformer(config, level, only_text=config.only_text[level], **kw)
      for _ in range(layers if attend else 0)
    ])
    self.upsamplers = nnx.List([] if level == 0 else [Upsample2D(o, **kw)])

  def __call__(
    self, x: jax.Array, skips: list[jax.Array], time: jax.Array, text: jax.Array
  ) -> jax.Array:
    for n, resnet in enumerate(self.resnets):
      x = self.run(resnet, x, time, skips.pop())
      x = self.attentions[n](x, text) if self.attentions else x
    for upsample in self.upsamplers:
      x = self.run(upsample, x)
    return x
