"""The vector-quantised autoencoder of latent diffusion (van den Oord et al. 2017; Rombach et al.
2022, appendix G): latents are replaced by the nearest of a learned set of code vectors.

Shape and names are those of diffusers' VQModel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.models.autoencoder import AutoencoderConfig
from diffusion_jax.models.config import Width, Widths, check_size
from diffusion_jax.models.layers import embed
from diffusion_jax.models.quantized import QuantizedAutoencoder
from diffusion_jax.types import Images, Latents, PerExample


@dataclasses.dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
  """The keys of a diffusers VQModel config.json; the defaults are latent diffusion's VQ-f4.

  vq_embed_dim None: as wide as the latents. lookup_from_codebook is for other libraries.
  """

  latent_channels: Width = 3
  block_out_channels: Widths = (128, 256, 512)
  num_vq_embeddings: Width = 8192
  vq_embed_dim: Width | None = None
  lookup_from_codebook: bool = False

  @property
  def code_channels(self) -> int:
    """Width of a code vector."""
    return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

  @property
  def vocabulary(self) -> int:
    """Number of codes."""
    return self.num_vq_embeddings


class Codebook(nnx.Module):
  """The code vectors [n e], and the replacement of latents by the nearest of them."""

  def __init__(self, count: int, features: int, **kw):
    def init(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -1 / count, 1 / count)

    self.embedding = embed(count, features, init, **kw)

  def nearest(self, z: jax.Array) -> jax.Array:
    """Index [...] of the code vector nearest to each z [... e], found in float32."""
    codes = self.embedding.embedding[...].astype(jnp.float32)
    # |z|^2 is the same for all codes, so it decides nothing.
    products = jnp.matmul(z.astype(jnp.float32), codes.T, precision=lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codes).sum(-1) - 2 * products, axis=-1)

  def __call__(
    self, z: Latents, *, beta: float = 0.25, legacy: bool = True
  ) -> tuple[Latents, jax.Array, PerExample]:
    """z [b h w e] -> (nearest code vectors [b h w e], their indices [b h w], loss [b]).

    Straight-through gradient. The loss is |sg(z) - e|^2 of the codebook plus beta |z - sg(e)|^2 of
    the commitment (van den Oord et al. 2017, eq. 3), means over positions and channels. legacy:
    beta weighs the codebook's term instead, as for the published models.
    """
    check_size(z.shape, self.embedding.features, 1, 'The latents to quantize')
    indices = self.nearest(z)
    codes = self.embedding(indices)
    distance = lambda a, b: jnp.square((a - b).astype(jnp.float32)).mean((1, 2, 3))
    codebook = distance(lax.stop_gradient(z), codes)
    commitment = distance(z, lax.stop_gradient(codes))
    loss = beta * codebook + commitment if legacy else codebook + beta * commitment
    return z + lax.stop_gradient(codes - z), indices, loss


class VQModel(QuantizedAutoencoder):
  """Images in [-1, 1] <-> latents <-> code vectors, all NHWC; `quantize` is a Codebook."""

  def __init__(self, config: VQConfig, **kw):
    super().__init__(config, config.code_channels, config.code_channels, **kw)
    self.quantize = Codebook(config.num_vq_embeddings, config.code_channels, **kw)

  def indices(self, z: Latents) -> jax.Array:
    return self.quantize.nearest(z)

  def codes(self, indices: jax.Array) -> Latents:
    return self.quantize.embedding(indices)

  def decode(self, z: Latents, *, quantized: bool = False) -> Images:
    """Latents [b h/f w/f e], quantised unless `quantized` -> images [b h w 3], not clipped."""
    check_size(z.shape, self.code_channels, 1, 'The latents to decode')
    return self.decode_codes(z if quantized else self.quantize(z)[0])
