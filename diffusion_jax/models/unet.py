"""The text-conditional U-Net of latent diffusion (Rombach et al. 2022; Ronneberger et al. 2015).

Names and computation follow diffusers' UNet2DConditionModel in the shapes of Stable Diffusion 1
and 2. The network knows nothing of noise: what its output means is the denoiser's business.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.attention import Transformer2DModel
from diffusion_jax.models.checks import require, size_fits
from diffusion_jax.models.embeddings import TimestepEmbedding, timestep_embedding
from diffusion_jax.models.layers import Conv, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from diffusion_jax.models.unet_config import UNetConfig
from diffusion_jax.types import Latents, Text, Timesteps

__all__ = ['UNet', 'UNetConfig']


def _resnet(config: UNetConfig, i: int, o: int, **kw) -> ResnetBlock2D:
  return ResnetBlock2D(
    i, o, groups=config.norm_num_groups, epsilon=config.norm_eps,
    time_features=4 * config.block_out_channels[0], **kw,
  )


def _transformer(config: UNetConfig, level: int, **kw) -> Transformer2DModel:
  return Transformer2DModel(
    config.block_out_channels[level], heads=config.heads[level], depth=config.depths[level],
    context_features=config.cross_attention_dim, groups=config.norm_num_groups,
    linear_projection=config.use_linear_projection, **kw,
  )


class DownBlock(nnx.Module):
  """Residual blocks, each with attention after it where the level has it; then halving.

  The last level does not halve.

  x [b h w i] -> [b h/2 w/2 o] and every intermediate result, for the skip connections.
  """

  def __init__(self, config: UNetConfig, level: int, **kw):
    widths, layers = config.block_out_channels, config.layers_per_block
    i, o = widths[max(level - 1, 0)], widths[level]
    attend = config.down_block_types[level].startswith('CrossAttn')
    self.resnets = nnx.List([_resnet(config, i if n == 0 else o, o, **kw) for n in range(layers)])
    self.attentions = nnx.List(
      [_transformer(config, level, **kw) for _ in range(layers if attend else 0)]
    )
    last = level == len(widths) - 1
    self.downsamplers = nnx.List([] if last else [Downsample2D(o, **kw)])

  def __call__(
    self, x: jax.Array, time: jax.Array, text: jax.Array
  ) -> tuple[jax.Array, list[jax.Array]]:
    skips = []
    for n, resnet in enumerate(self.resnets):
      x = resnet(x, time)
      x = self.attentions[n](x, text) if self.attentions else x
      skips.append(x)
    for downsample in self.downsamplers:
      x = downsample(x)
      skips.append(x)
    return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
  """Residual block, attention, residual block at the lowest resolution: [b h w c] -> [b h w c]."""

  def __init__(self, config: UNetConfig, **kw):
    c = config.block_out_channels[-1]
    self.attentions = nnx.List([_transformer(config, len(config.heads) - 1, **kw)])
    self.resnets = nnx.List([_resnet(config, c, c, **kw) for _ in range(2)])

  def __call__(self, x: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
    x = self.attentions[0](self.resnets[0](x, time), text)
    return self.resnets[1](x, time)


class UpBlock(nnx.Module):
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
    self.attentions = nnx.List(
      [_transformer(config, level, **kw) for _ in range(layers if attend else 0)]
    )
    self.upsamplers = nnx.List([] if level == 0 else [Upsample2D(o, **kw)])

  def __call__(
    self, x: jax.Array, skips: list[jax.Array], time: jax.Array, text: jax.Array
  ) -> jax.Array:
    for n, resnet in enumerate(self.resnets):
      x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), time)
      x = self.attentions[n](x, text) if self.attentions else x
    for upsample in self.upsamplers:
      x = upsample(x)
    return x


class UNet(nnx.Module):
  """x, time and text -> an array shaped like x (with out_channels)."""

  def __init__(
    self, config: UNetConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    widths, levels = config.block_out_channels, range(len(config.block_out_channels))
    self.config = config
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **kw)
    self.down_blocks = nnx.List([DownBlock(config, level, **kw) for level in levels])
    self.mid_block = UNetMidBlock2DCrossAttn(config, **kw)
    self.up_blocks = nnx.List([UpBlock(config, step, **kw) for step in levels])
    self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, **kw)
    self.conv_out = Conv(widths[0], config.out_channels, **kw)

  def __call__(self, x: Latents, t: Timesteps, text: Text) -> Latents:
    """x [b h w c], t [b] in [0, T), text [b l d] -> [b h w c].

    UserError where h or w cannot be halved once per level, or a shape does not match the config.
    """
    self._check(x, t, text)
    time = self.time_embedding(self._sinusoids(t))
    x = self.conv_in(x)
    skips = [x]
    for block in self.down_blocks:
      x, more = block(x, time, text)
      skips += more
    x = self.mid_block(x, time, text)
    for block in self.up_blocks:
      x = block(x, skips, time, text)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))

  def _sinusoids(self, t: jax.Array) -> jax.Array:
    return timestep_embedding(
      t, self.config.block_out_channels[0], flip_sin_to_cos=self.config.flip_sin_to_cos,
      freq_shift=self.config.freq_shift,
    )

  def _check(self, x: jax.Array, t: jax.Array, text: jax.Array) -> None:
    size_fits(x.shape, self.config.in_channels, self.config.factor, 'The latents')
    width = self.config.cross_attention_dim
    require(
      text.ndim == 3 and text.shape[0] == x.shape[0] and text.shape[-1] == width,
      f'The text must have shape [{x.shape[0]} l {width}] (cross_attention_dim), '
      f'not {list(text.shape)}.',
    )
    require(t.shape == x.shape[:1], f'The times must have shape [{x.shape[0]}], not {t.shape}.')
