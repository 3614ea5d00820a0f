"""The discrete variational autoencoder of DALL-E (Ramesh et al. 2021, section 2.1, appendix A.2).

The encoder gives, at each place, a categorical distribution over the codes. Training samples it by
the Gumbel-softmax relaxation (Jang et al. 2017; Maddison et al. 2017); afterwards the likeliest
code stands. The residual network is latent diffusion's instead of DALL-E's own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.autoencoder import AutoencoderConfig
from diffusion_jax.models.config import Width
from diffusion_jax.models.layers import embed, pointwise
from diffusion_jax.models.quantized import QuantizedAutoencoder
from diffusion_jax.types import Latents

SPREAD = 36.0
"""Variance of the first logits over that of what they are made from."""


@dataclasses.dataclass(frozen=True)
class DVAEConfig(AutoencoderConfig):
  """num_vq_embeddings: codes; vq_embed_dim: channels of a code."""

  num_vq_embeddings: Width = 8192
  vq_embed_dim: Width = 128

  @property
  def vocabulary(self) -> int:
    """Number of codes."""
    return self.num_vq_embeddings


class DiscreteVAE(QuantizedAutoencoder):
  """Images in [-1, 1] <-> logits over codes [b h w n]; `codebook` has their vectors."""

  def __init__(self, config: DVAEConfig, **kw):
    super().__init__(config, config.num_vq_embeddings, config.vq_embed_dim, **kw)
    # Logits as large as Gumbel noise: smaller ones are lost in it, and few codes come into use.
    spread = nnx.initializers.variance_scaling(SPREAD, 'fan_in', 'normal')
    self.quant_conv = pointwise(config.latent_channels, self.features, init=spread, **kw)
    normal = nnx.initializers.normal(1.0)
    self.codebook = embed(config.num_vq_embeddings, config.vq_embed_dim, normal, **kw)

  def indices(self, z: Latents) -> jax.Array:
    return z.argmax(-1)

  def codes(self, indices: jax.Array) -> Latents:
    return self.codebook(indices)

  def relaxed(self, logits: Latents, key: jax.Array, temperature: jax.Array) -> Latents:
    """Logits [b h w n] -> mixtures of codes [b h w e], the Gumbel-softmax sample's.

    y = softmax((logits + g) / temperature), g of the Gumbel distribution: near one code where the
    temperature is near 0. In float32.
    """
    noisy = logits.astype(jnp.float32) + jax.random.gumbel(key, logits.shape)
    weights = jax.nn.softmax(noisy / temperature, axis=-1)
    table = self.codebook.embedding[...]
    return weights.astype(logits.dtype) @ table.astype(logits.dtype)
