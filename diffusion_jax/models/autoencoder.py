"""The KL autoencoder of latent diffusion (Rombach et al. 2022, sec. 3.1 and appendix G).

Shape and names are those of Stable Diffusion's (diffusers' AutoencoderKL).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.autoencoder_blocks import Decoder, Encoder, check_levels
from diffusion_jax.models.checks import size_fits
from diffusion_jax.models.layers import pointwise
from diffusion_jax.types import Images, Latents


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """The keys of a diffusers AutoencoderKL config.json; the defaults are Stable Diffusion 1's.

  The size factor is 2^(len(block_out_channels) - 1). `scaling_factor` and `shift_factor` are not
  applied by the network: latents = (z - shift_factor) * scaling_factor. `sample_size` (pixels) and
  `force_upcast` are kept for other libraries: the first is the tile of diffusers' tiling, the
  second tells its pipelines not to decode in half precision. Empty block types mean no attention
  but the middle's.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  down_block_types: tuple[str, ...] = ()
  up_block_types: tuple[str, ...] = ()
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0
  sample_size: int | tuple[int, ...] | None = None
  force_upcast: bool = True

  def __post_init__(self):
    check_levels(self)

  @property
  def factor(self) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKL(nnx.Module):
  """Images in [-1, 1] <-> a diagonal Gaussian over latents, both NHWC."""

  def __init__(
    self, config: AutoencoderKLConfig, *, dtype=jnp.float32, param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    c = config.latent_channels
    self.config = config
    self.encoder = Encoder(config, 2 * c, **kw)
    self.decoder = Decoder(config, **kw)
    self.quant_conv = pointwise(2 * c, 2 * c, **kw) if config.use_quant_conv else None
    self.post_quant_conv = pointwise(c, c, **kw) if config.use_post_quant_conv else None

  def encode(self, images: Images) -> tuple[Latents, Latents]:
    """Images [b h w 3] in [-1, 1] -> (mean, log-variance), each [b h/f w/f c], unscaled.

    The log-variance is clipped to [-30, 20]. UserError where h or w is no multiple of f.
    """
    size_fits(images.shape, self.config.in_channels, self.config.factor, 'The images to encode')
    moments = self.encoder(images)
    if self.quant_conv is not None:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: Latents) -> Images:
    """Unscaled latents [b h/f w/f c] -> images [b h w 3], about [-1, 1] but not clipped."""
    size_fits(z.shape, self.config.latent_channels, 1, 'The latents to decode')
    return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
