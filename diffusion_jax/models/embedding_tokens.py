"""Embeddings as tokens, for DALL-E 2's autoregressive prior (Ramesh et al. 2022, section 2.2).

Principal components, in the order of their variance, each cut into equal intervals: a token is the
number of the interval. Nothing is trained; all is measured on embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from diffusion_jax.models.config import NetworkConfig, Width
from diffusion_jax.models.network import PLAIN, Compute
from diffusion_jax.types import Params

Embeddings = Float[np.ndarray, 'n p']


@dataclasses.dataclass(frozen=True)
class EmbeddingTokensConfig(NetworkConfig):
  """The defaults are the paper's: 319 components of 1024 numbers, in 1024 intervals."""

  embedding_dim: Width = 1024
  components: Width = 319
  intervals: Width = 1024

  def check(self) -> None:
    self.require(
      self.components <= self.embedding_dim, 'components',
      f'must be at most embedding_dim={self.embedding_dim}',
    )

  @property
  def vocabulary(self) -> int:
    """Number of tokens."""
    return self.intervals

  @property
  def factor(self) -> int:
    """Pixels to a token along one side: an embedding has none."""
    return 1


class EmbeddingTokens(nnx.Module):
  """Embeddings [b p] <-> tokens [b n]."""

  def __init__(
    self, config: EmbeddingTokensConfig, *, compute: Compute = PLAIN, rngs: nnx.Rngs
  ):
    del rngs
    p, n, dtype = config.embedding_dim, config.components, compute.param_dtype
    self.config = config
    self.mean_bias = nnx.Param(jnp.zeros(p, dtype))
    self.basis_kernel = nnx.Param(jnp.eye(p, n, dtype=dtype))
    self.low_bias = nnx.Param(-jnp.ones(n, dtype))
    self.width_scale = nnx.Param(jnp.full(n, 2 / config.intervals, dtype))

  def tokens(self, embeddings: jax.Array) -> Int[jax.Array, 'b n']:
    """Return the numbers of intervals; beyond the outer ones, those."""
    components = (embeddings.astype(jnp.float32) - self.mean_bias[...]) @ self.basis_kernel[...]
    numbers = jnp.floor((components - self.low_bias[...]) / self.width_scale[...])
    return jnp.clip(numbers, 0, self.config.intervals - 1).astype(jnp.int32)

  def embeddings(self, tokens: jax.Array) -> jax.Array:
    """Return the embeddings at the middles of the intervals, float32."""
    components = (tokens + 0.5) * self.width_scale[...] + self.low_bias[...]
    return components @ self.basis_kernel[...].T + self.mean_bias[...]


def fitted(found: Embeddings, config: EmbeddingTokensConfig) -> Params:
  """Return the parameters for embeddings like these: their components, and intervals that reach
  from the least to the largest of each."""
  found = np.asarray(found, np.float64)
  mean = found.mean(0)
  _, _, rows = np.linalg.svd(found - mean, full_matrices=True)
  basis = rows[: config.components].T
  components = (found - mean) @ basis
  low, high = components.min(0), components.max(0)
  width = np.maximum((high - low) / config.intervals, 1e-6)
  arrays = {'mean_bias': mean, 'basis_kernel': basis, 'low_bias': low, 'width_scale': width}
  return {name: np.asarray(value, np.float32) for name, value in arrays.items()}
