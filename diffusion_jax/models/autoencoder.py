"""The KL autoencoder of latent diffusion (Rombach et al. 2022, sec. 3.1 and appendix G).

Shape and names are those of Stable Diffusion's (diffusers' AutoencoderKL): every norm has epsilon
1e-6, one residual attention sits in each middle block, downsampling pads right and bottom only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.attention import SpatialAttention
from diffusion_jax.models.checks import (
  all_positive,
  freeze_lists,
  groups_divide,
  positive,
  require,
  size_fits,
)
from diffusion_jax.models.layers import (
  Conv,
  Downsample2D,
  GroupNorm,
  ResnetBlock2D,
  Upsample2D,
  pointwise,
)
from diffusion_jax.types import Images, Latents

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """The keys of a diffusers AutoencoderKL config.json; the defaults are Stable Diffusion 1's.

  The size factor is 2^(len(block_out_channels) - 1). `scaling_factor` and `shift_factor` are not
  applied by the network: latents = (z - shift_factor) * scaling_factor.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0

  def __post_init__(self):
    freeze_lists(self)
    positive(self, 'in_channels', 'out_channels', 'latent_channels', 'layers_per_block',
             'norm_num_groups')
    all_positive(self, 'block_out_channels')
    groups_divide(self)
    require(self.scaling_factor > 0,
            f'AutoencoderKLConfig.scaling_factor must be positive, not {self.scaling_factor}.')

  @property
  def factor(self) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(self.block_out_channels) - 1)


class DownEncoderBlock2D(nnx.Module):
  """`layers` residual blocks, then, unless last, halving."""

  def __init__(self, i: int, o: int, *, layers: int, halve: bool, groups: int, **kw):
    self.resnets = nnx.List([
      ResnetBlock2D(i if n == 0 else o, o, groups=groups, epsilon=EPSILON, **kw)
      for n in range(layers)
    ])
    self.downsamplers = nnx.List([Downsample2D(o, asymmetric=True, **kw)] if halve else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (*self.resnets, *self.downsamplers):
      x = layer(x)
    return x


class UpDecoderBlock2D(nnx.Module):
  """`layers` residual blocks, then, unless last, doubling."""

  def __init__(self, i: int, o: int, *, layers: int, double: bool, groups: int, **kw):
    self.resnets = nnx.List([
      ResnetBlock2D(i if n == 0 else o, o, groups=groups, epsilon=EPSILON, **kw)
      for n in range(layers)
    ])
    self.upsamplers = nnx.List([Upsample2D(o, **kw)] if double else [])

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in (*self.resnets, *self.upsamplers):
      x = layer(x)
    return x


class UNetMidBlock2D(nnx.Module):
  """Residual block, attention (optional), residual block: [b h w c] -> [b h w c]."""

  def __init__(self, channels: int, *, attention: bool, groups: int, **kw):
    norm = dict(groups=groups, epsilon=EPSILON)
    self.attentions = nnx.List([SpatialAttention(channels, **norm, **kw)] if attention else [])
    self.resnets = nnx.List([ResnetBlock2D(channels, channels, **norm, **kw) for _ in range(2)])

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.resnets[0](x)
    for attention in self.attentions:
      x = attention(x)
    return self.resnets[1](x)


class Encoder(nnx.Module):
  """Images [b h w i] -> means and log-variances side by side [b h/f w/f 2c]."""

  def __init__(self, config: AutoencoderKLConfig, **kw):
    widths, groups = config.block_out_channels, config.norm_num_groups
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    self.down_blocks = nnx.List([
      DownEncoderBlock2D(
        widths[max(n - 1, 0)], width, layers=config.layers_per_block,
        halve=n < len(widths) - 1, groups=groups, **kw,
      )
      for n, width in enumerate(widths)
    ])
    self.mid_block = UNetMidBlock2D(
      widths[-1], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """Latents [b h/f w/f c] -> images [b h w o]; one residual block more per level than down."""

  def __init__(self, config: AutoencoderKLConfig, **kw):
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    self.conv_in = Conv(config.latent_channels, widths[0], **kw)
    self.mid_block = UNetMidBlock2D(
      widths[0], attention=config.mid_block_add_attention, groups=groups, **kw
    )
    self.up_blocks = nnx.List([
      UpDecoderBlock2D(
        widths[max(n - 1, 0)], width, layers=config.layers_per_block + 1,
        double=n < len(widths) - 1, groups=groups, **kw,
      )
      for n, width in enumerate(widths)
    ])
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPSILON, **kw)
    self.conv_out = Conv(widths[-1], config.out_channels, **kw)

  def __call__(self, z: jax.Array) -> jax.Array:
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Images in [-1, 1] <-> a diagonal Gaussian over latents, both NHWC."""

  def __init__(
    self, config: AutoencoderKLConfig, *, dtype=jnp.float32, param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    c = config.latent_channels
    self.config = config
    self.encoder = Encoder(config, **kw)
    self.decoder = Decoder(config, **kw)
    self.quant_conv = pointwise(2 * c, 2 * c, **kw)
    self.post_quant_conv = pointwise(c, c, **kw)

  def encode(self, images: Images) -> tuple[Latents, Latents]:
    """Images [b h w 3] in [-1, 1] -> (mean, log-variance), each [b h/f w/f c], unscaled.

    The log-variance is clipped to [-30, 20]. UserError where h or w is no multiple of f.
    """
    size_fits(images.shape, self.config.in_channels, self.config.factor, 'The images to encode')
    mean, logvar = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: Latents) -> Images:
    """Unscaled latents [b h/f w/f c] -> images [b h w 3], about [-1, 1] but not clipped."""
    size_fits(z.shape, self.config.latent_channels, 1, 'The latents to decode')
    return self.decoder(self.post_quant_conv(z))
