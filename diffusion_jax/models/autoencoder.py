"""The KL autoencoder of latent diffusion (Rombach et al. 2022, sec. 3.1 and appendix G).

Shapes and names are Stable Diffusion's (diffusers' AutoencoderKL): norms have epsilon 1e-6,
downsampling pads right and bottom, attention has one head. The VQ autoencoder shares encoder and
decoder.

`decode_sliced`, `decode_tiled` and `encode_tiled` save memory for any object with `decode`,
`moments` and `config.factor`, and can be jitted: parts follow from shapes, one after the other in
lax.map. Activations of Stable
Diffusion's in float32 on CPUs, by XLA's plan: 3.5 GiB for one 1024 x 1024 image, 0.9 GiB in tiles;
7.0 GiB for eight of 512 x 512, 0.9 GiB in slices.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.errors import require
from diffusion_jax.models.attention import SpatialAttention
from diffusion_jax.models.config import (
  Edge,
  Factor,
  Layers,
  NetworkConfig,
  PerLevel,
  Shift,
  Width,
  Widths,
  check_size,
)
from diffusion_jax.models.layers import Conv, Downsample2D, ResnetBlock2D, Upsample2D, pointwise
from diffusion_jax.models.network import Blocks
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Images, Latents

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(NetworkConfig):
  """Config of encoder and decoder; the defaults are Stable Diffusion 1's.

  The size factor is 2^(len(block_out_channels) - 1). The network does not apply scaling_factor.
  sample_size (pixels) is for other libraries: the tile of diffusers' tiling. Empty block types: no
  attention but the middle's.
  """

  in_channels: Width = 3
  out_channels: Width = 3
  latent_channels: Width = 4
  block_out_channels: Widths = (128, 256, 512, 512)
  layers_per_block: Layers = 2
  norm_num_groups: Width = 32
  mid_block_add_attention: bool = True
  down_block_types: tuple[Literal['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'], ...] = ()
  up_block_types: tuple[Literal['UpDecoderBlock2D', 'AttnUpDecoderBlock2D'], ...] = ()
  scaling_factor: Factor = 0.18215
  sample_size: Edge | Annotated[tuple[Edge, ...], PerLevel] | None = None

  def check(self) -> None:
    levels = len(self.block_out_channels)
    plain = {'down_block_types': 'DownEncoderBlock2D', 'up_block_types': 'UpDecoderBlock2D'}
    for field, block_type in plain.items():
      object.__setattr__(self, field, getattr(self, field) or (block_type,) * levels)
    self.check_entries(levels, plain)
    self.check_groups()
    self.check_blocks(2 * levels * self.layers_per_block)

  @property
  def factor(self) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(self.block_out_channels) - 1)


class Level(Blocks):
  """Residual blocks, with attention after each or not; then halving, doubling, or neither."""

  def __init__(
    self, i: int, o: int, layers: int, attention: bool, groups: int, *, halve: bool = False,
    double: bool = False, **kw,
  ):
    super().__init__(**kw)
    norm = dict(groups=groups, epsilon=EPSILON)
    self.resnets = nnx.List([
      ResnetBlock2D(i if n == 0 else o, o, **norm, **kw) for n in range(layers)
    ])
    self.attentions = nnx.List([
      SpatialAttention(o, **norm, **kw) for _ in range(layers if attention else 0)
    ])
    self.downsamplers = nnx.List([Downsample2D(o, asymmetric=True, **kw)] if halve else [])
    self.upsamplers = nnx.List([Upsample2D(o, **kw)] if double else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for n, resnet in enumerate(self.resnets):
      x = self.run(resnet, x)
      x = self.run(self.attentions[n], x) if self.attentions else x
    for layer in (*self.downsamplers, *self.upsamplers):
      x = self.run(layer, x)
    return x


class UNetMidBlock2D(Blocks):
  """Residual block, attention (optional), residual block: [b h w c] -> [b h w c]."""

  def __init__(self, channels: int, *, attention: bool, groups: int, **kw):
    super().__init__(**kw)
    norm = dict(groups=groups, epsilon=EPSILON)
    self.attentions = nnx.List([SpatialAttention(channels, **norm, **kw)] if attention else [])
    self.resnets = nnx.List([ResnetBlock2D(channels, channels, **norm, **kw) for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
      x = self.run(layer, x)
    return x


def _levels(
  config: AutoencoderConfig, widths: tuple[int, ...], block_types: tuple[str, ...], layers: int,
  change: str, **kw,
) -> nnx.List:
  """Return levels that `change` the size, 'halve' or 'double', except the last."""
  inputs, groups, last = (widths[0], *widths), config.norm_num_groups, len(widths) - 1
  attention = [block_type.startswith('Attn') for block_type in block_types]
  return nnx.List([
    Level(inputs[n], width, layers, attention[n], groups, **{change: n < last}, **kw)
    for n, width in enumerate(widths)
  ])


class _Half(Blocks):
  """A convolution, `parts`, and norm and convolution."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.run_all(self._all, x)

  def _all(self, x: jax.Array) -> jax.Array:
    x = constrain(self.conv_in(x), 'image')
    for part in self.parts:
      x = part(x)
    return self.run(self._finish, x)

  def _finish(self, x: jax.Array) -> jax.Array:
    return constrain(self.conv_out(self.conv_norm_out(x, activate=True)), 'image')


class Encoder(_Half):
  """Images [b h w i] -> [b h/f w/f out_channels]."""

  parts = property(lambda self: (*self.down_blocks, self.mid_block))

  def __init__(self, config: AutoencoderConfig, out_channels: int, **kw):
    super().__init__(**kw)
    widths, groups = config.block_out_channels, config.norm_num_groups
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    types, layers = config.down_block_types, config.layers_per_block
    self.down_blocks = _levels(config, widths, types, layers, 'halve', **kw)
    self.mid_block = UNetMidBlock2D(
      widths[-1], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], out_channels, **kw)


class Decoder(_Half):
  """Latents [b h/f w/f c] -> images [b h w o]; one residual block more per level than down."""

  parts = property(lambda self: (self.mid_block, *self.up_blocks))

  def __init__(self, config: AutoencoderConfig, **kw):
    super().__init__(**kw)
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    self.conv_in = Conv(config.latent_channels, widths[0], **kw)
    self.mid_block = UNetMidBlock2D(
      widths[0], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    types, layers = config.up_block_types, config.layers_per_block + 1
    self.up_blocks = _levels(config, widths, types, layers, 'double', **kw)
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], config.out_channels, **kw)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
  """The keys of a diffusers AutoencoderKL config.json.

  latents = (z - shift_factor) * scaling_factor. force_upcast: no half precision in diffusers.
  """

  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  shift_factor: Shift = 0.0
  force_upcast: bool = True


class AutoencoderKL(nnx.Module):
  """Images in [-1, 1] <-> a diagonal Gaussian over latents, both NHWC."""

  def __init__(self, config: AutoencoderKLConfig, **kw):
    c = config.latent_channels
    self.config = config
    self.encoder = Encoder(config, 2 * c, **kw)
    self.decoder = Decoder(config, **kw)
    self.quant_conv = pointwise(2 * c, 2 * c, **kw) if config.use_quant_conv else None
    self.post_quant_conv = pointwise(c, c, **kw) if config.use_post_quant_conv else None

  def encode(self, images: Images) -> tuple[Latents, Latents]:
    """Images [b h w 3] in [-1, 1] -> (mean, log-variance in [-30, 20]) [b h/f w/f c], unscaled.

    UserError where h or w is no multiple of f.
    """
    return _mean_and_logvar(self.moments(images))

  def moments(self, images: Images) -> jax.Array:
    """Images [b h w 3] -> mean and log-variance, without its bounds, in one: [b h/f w/f 2c]."""
    check_size(images.shape, self.config.in_channels, self.config.factor, 'The images to encode')
    moments = self.encoder(images)
    return moments if self.quant_conv is None else self.quant_conv(moments)

  def decode(self, z: Latents) -> Images:
    """Unscaled latents [b h/f w/f c] -> images [b h w 3], about [-1, 1] but not clipped."""
    check_size(z.shape, self.config.latent_channels, 1, 'The latents to decode')
    return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

  def reconstruct(self, images: Images) -> Images:
    """Images [b h w 3] in [-1, 1] -> the images of their latents' means, not clipped."""
    return self.decode(self.encode(images)[0])


def _mean_and_logvar(moments: jax.Array) -> tuple[Latents, Latents]:
  """Moments [... 2c] -> (mean, log-variance in [-30, 20]) [... c]."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)


def decode_sliced(autoencoder: Any, z: Latents, *, at_once: int = 1) -> Images:
  """Return autoencoder.decode(z), computed `at_once` images at a time: the same in less memory."""
  require(at_once > 0, f'at_once must be positive, not {at_once}.')
  z, b = jnp.asarray(z), z.shape[0]
  if b <= at_once:
    return autoencoder.decode(z)
  parts = -(-b // at_once)
  # Repeating the last row fills up the last part and changes no other.
  rows = jnp.minimum(jnp.arange(parts * at_once), b - 1).reshape(parts, at_once)
  out = lax.map(lambda part: autoencoder.decode(z[part]), rows)
  return out.reshape(-1, *out.shape[2:])[:b]


def decode_tiled(autoencoder: Any, z: Latents, *, tile: int = 64, overlap: int = 16) -> Images:
  """autoencoder.decode(z) of overlapping tiles; `tile` and `overlap` are in latent cells.

  Tiles start every `tile - overlap` cells, overlaps are blended linearly, as in diffusers'
  `enable_tiling` (overlap a quarter of the tile). Norms and attention see one tile, so colours may
  differ a little. Edge tiles are smaller; each shape, at most nine, is compiled once. UserError
  where 2 overlap > tile.
  """
  _check_tiles(tile, overlap)
  z, step, factor = jnp.asarray(z), tile - overlap, autoencoder.config.factor
  if max(z.shape[1:3]) <= tile:
    return autoencoder.decode(z)
  tiles = _of_tiles(autoencoder.decode, z, tile, step)
  return _blend(tiles, step, step * factor, overlap * factor)


def encode_tiled(
  autoencoder: Any, images: Images, *, tile: int = 64, overlap: int = 16
) -> tuple[Latents, Latents]:
  """autoencoder.encode(images) of the tiles of `decode_tiled`, whose moments are blended alike."""
  _check_tiles(tile, overlap)
  images, step, factor = jnp.asarray(images), tile - overlap, autoencoder.config.factor
  if max(images.shape[1:3]) <= tile * factor:
    return autoencoder.encode(images)
  tiles = _of_tiles(autoencoder.moments, images, tile * factor, step * factor)
  return _mean_and_logvar(_blend(tiles, step * factor, step, overlap))


def _check_tiles(tile: int, overlap: int) -> None:
  require(0 <= 2 * overlap <= tile and tile > 0,
          f'overlap={overlap} must be at least 0 and at most half of tile={tile}.')


def _of_tiles(
  run: Callable, x: jax.Array, tile: int, step: int
) -> dict[tuple[int, int], jax.Array]:
  """Return run(tile) of tiles [b h w c] that begin every `step` places, by their beginnings."""
  groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
  for i in range(0, x.shape[1], step):
    for j in range(0, x.shape[2], step):
      shape = min(tile, x.shape[1] - i), min(tile, x.shape[2] - j)
      groups.setdefault(shape, []).append((i, j))
  tiles = {}
  for shape, starts in groups.items():  # Tiles of one shape go through one compiled loop.
    cut = lambda at, shape=shape: lax.dynamic_slice(
      x, (0, at[0], at[1], 0), (x.shape[0], *shape, x.shape[3])
    )
    tiles |= zip(starts, lax.map(lambda at, cut=cut: run(cut(at)), jnp.array(starts)), strict=True)
  return dict(sorted(tiles.items()))


def _blend(tiles: dict[tuple[int, int], jax.Array], step: int, keep: int, blend: int) -> jax.Array:
  """Join tiles, each shown by its first `keep` rows and columns.

  Its first `blend` are faded in from the finished tiles above and to the left.
  """
  finished: dict[tuple[int, int], jax.Array] = {}
  rows: dict[int, list[jax.Array]] = {}
  for (i, j), tile in tiles.items():
    if i > 0:
      tile = _fade(finished[i - step, j], tile, blend, axis=1)
    if j > 0:
      tile = _fade(finished[i, j - step], tile, blend, axis=2)
    finished[i, j] = tile
    rows.setdefault(i, []).append(tile[:, :keep, :keep])
  return jnp.concatenate([jnp.concatenate(row, axis=2) for row in rows.values()], axis=1)


def _fade(before: jax.Array, after: jax.Array, length: int, axis: int) -> jax.Array:
  """Return `after`, whose first `length` entries along `axis` fade in over the last of `before`."""
  length = min(length, before.shape[axis], after.shape[axis])
  old = lax.slice_in_dim(before, before.shape[axis] - length, None, axis=axis)
  new = lax.slice_in_dim(after, 0, length, axis=axis)
  rest = lax.slice_in_dim(after, length, None, axis=axis)
  weight = (jnp.arange(length, dtype=jnp.float32) / max(length, 1)).astype(after.dtype)
  weight = jnp.expand_dims(weight, [n for n in range(after.ndim) if n != axis])
  return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)
