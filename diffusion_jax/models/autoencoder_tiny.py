"""TAESD, a small autoencoder distilled from Stable Diffusion's, for previews.

Source: madebyollin's TAESD; shape and names are those of diffusers' AutoencoderTiny. Its layers see
images in [0, 1]; `encode` and `decode` take [-1, 1].
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.config import (
  Factor,
  LayersPerLevel,
  NetworkConfig,
  Shift,
  Width,
  Widths,
  check_size,
)
from diffusion_jax.models.layers import Conv, Function, double, in_turn
from diffusion_jax.types import Images, Latents

ACTIVATIONS = {
  'relu': jax.nn.relu, 'silu': jax.nn.silu, 'swish': jax.nn.silu, 'mish': jax.nn.mish,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig(NetworkConfig):
  """The keys of a diffusers AutoencoderTiny config.json; the defaults are TAESD's.

  One width and block count per level; all widths of a side are equal. The size factor is 2^(levels
  - 1). The network does not apply scaling_factor and shift_factor. latent_magnitude and
  latent_shift are for other libraries.
  """

  in_channels: Width = 3
  out_channels: Width = 3
  latent_channels: Width = 4
  encoder_block_out_channels: Widths = (64, 64, 64, 64)
  decoder_block_out_channels: Widths = (64, 64, 64, 64)
  num_encoder_blocks: LayersPerLevel = (1, 3, 3, 3)
  num_decoder_blocks: LayersPerLevel = (3, 3, 3, 1)
  act_fn: Literal['relu', 'silu', 'swish', 'mish', 'gelu'] = 'relu'
  latent_magnitude: Factor = 3.0
  latent_shift: Shift = 0.5
  scaling_factor: Factor = 1.0
  shift_factor: Shift = 0.0

  def check(self) -> None:
    self.check_blocks(sum(self.num_encoder_blocks) + sum(self.num_decoder_blocks))
    widths = 'encoder_block_out_channels', 'decoder_block_out_channels'
    levels = len(self.encoder_block_out_channels)
    self.check_entries(levels, (*widths, 'num_encoder_blocks', 'num_decoder_blocks'))
    for field in widths:
      self.require(len(set(getattr(self, field))) == 1, field, 'must hold one width throughout')

  @property
  def factor(self) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(self.encoder_block_out_channels) - 1)


class AutoencoderTinyBlock(nnx.Module):
  """Three convolutions around an identity, then ReLU: [b h w c] -> [b h w c]."""

  def __init__(self, channels: int, act_fn: str, **kw):
    conv = lambda: Conv(channels, channels, **kw)
    active = lambda: Function(ACTIVATIONS[act_fn])
    self.conv = nnx.List([conv(), active(), conv(), active(), conv()])

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x + in_turn(self.conv, x))


class Half(nnx.Module):
  """Encoder, images in [0, 1] [b h w i] -> latents [b h/f w/f c], or decoder, the other way."""

  def __init__(self, layers: Iterable[nnx.Module]):
    self.layers = nnx.List(layers)

  def __call__(self, x: jax.Array) -> jax.Array:
    return in_turn(self.layers, x)


def _blocks(counts: tuple[int, ...], width: int, act_fn: str, between: Callable, **kw):
  """Yield each level's blocks, and before all but the first what `between` makes."""
  for n, blocks in enumerate(counts):
    if n > 0:
      yield from between()
    for _ in range(blocks):
      yield AutoencoderTinyBlock(width, act_fn, **kw)


class AutoencoderTiny(nnx.Module):
  """Images in [-1, 1] <-> latents, both NHWC."""

  def __init__(self, config: AutoencoderTinyConfig, **kw):
    self.config = config
    c, act_fn = config.latent_channels, config.act_fn
    down, up = config.encoder_block_out_channels[0], config.decoder_block_out_channels[0]
    halve = lambda: [Conv(down, down, stride=2, use_bias=False, **kw)]
    twice = lambda: [Function(double), Conv(up, up, use_bias=False, **kw)]
    self.encoder = Half([
      Conv(config.in_channels, down, **kw),
      *_blocks(config.num_encoder_blocks, down, act_fn, halve, **kw), Conv(down, c, **kw),
    ])
    self.decoder = Half([
      Conv(c, up, **kw), Function(ACTIVATIONS[act_fn]),
      *_blocks(config.num_decoder_blocks, up, act_fn, twice, **kw),
      Conv(up, config.out_channels, **kw),
    ])

  def encode(self, images: Images) -> Latents:
    """Images [b h w 3] in [-1, 1] -> latents [b h/f w/f c], unscaled; UserError unless f fits."""
    check_size(images.shape, self.config.in_channels, self.config.factor, 'The images to encode')
    return self.encoder((images + 1) / 2)

  def decode(self, z: Latents) -> Images:
    """Unscaled latents [b h/f w/f c], squashed by 3 tanh(z / 3) -> images [b h w 3], unclipped."""
    check_size(z.shape, self.config.latent_channels, 1, 'The latents to decode')
    return self.decoder(jnp.tanh(z / 3) * 3) * 2 - 1
