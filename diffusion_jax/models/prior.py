"""The diffusion prior of DALL-E 2 (Ramesh et al. 2022, section 2.2): CLIP's embedding of a text to
that of a picture.

A causal transformer reads the text, its embedding, the time, the noised embedding of a picture, and
at last a learned token, whose output is the estimate. Names are those of diffusers'
PriorTransformer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.models.attention import GELU, Attention, FeedForward
from diffusion_jax.models.config import Layers, NetworkConfig, Width
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Timesteps

normal = nnx.initializers.normal


@dataclasses.dataclass(frozen=True)
class PriorTransformerConfig(NetworkConfig):
  """The keys of a diffusers PriorTransformer config.json; the defaults are Karlo's.

  embedding_dim: of the embeddings of pictures, of the hidden states of texts, and of theirs unless
  embedding_proj_dim says otherwise. num_embeddings: tokens of a text.
  """

  num_attention_heads: Width = 32
  attention_head_dim: Width = 64
  num_layers: Layers = 20
  embedding_dim: Width = 768
  num_embeddings: Width = 77
  embedding_proj_dim: Width | None = None

  def check(self) -> None:
    self.check_blocks(self.num_layers)

  @property
  def width(self) -> int:
    """Width of the transformer."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def in_channels(self) -> int:
    """Numbers of an embedding."""
    return self.embedding_dim

  out_channels = in_channels

  @property
  def conditions(self) -> Shapes:
    """Shapes of the text and its embedding."""
    pooled = self.embedding_proj_dim or self.embedding_dim
    return {'text': (self.num_embeddings, self.embedding_dim), 'pooled': (pooled,)}


class ExactGELU(GELU):
  """GELU itself (Hendrycks & Gimpel 2016, eq. 1) of a dense layer."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(constrain(self.proj(x), 'hidden'), approximate=False)


class CausalBlock(nnx.Module):
  """Self-attention and feed-forward, each pre-normed and residual: [b n c] -> [b n c]."""

  def __init__(self, config: PriorTransformerConfig, **kw):
    width = config.width
    self.norm1 = LayerNorm(width, **kw)
    self.attn1 = Attention(width, heads=config.num_attention_heads, qkv_bias=True, **kw)
    self.norm3 = LayerNorm(width, **kw)
    self.ff = FeedForward(width, ExactGELU, **kw)

  def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
    """`seen` [b n n]: which places (last) each place (the one before) attends to."""
    attention, y = self.attn1, self.norm1(x)
    parts = attention.to_q, attention.to_k, attention.to_v
    q, k, v = (attention.by_head(part(y)) for part in parts)
    y = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    x = x + constrain(attention.to_out[0](y.reshape(x.shape)), 'tokens')
    return x + self.ff(self.norm3(x))


class PriorTransformer(Denoiser):
  """(noised embedding [b e], t [b], condition with `text` [b l e] and `pooled` [b p]) -> [b e].

  clip_mean and clip_std are for other libraries, which scale embeddings by them after sampling.
  """

  def __init__(self, config: PriorTransformerConfig, **kw):
    super().__init__(**kw)
    width, e = config.width, config.embedding_dim
    rngs, dtype = kw['rngs'], kw['compute'].param_dtype if 'compute' in kw else jnp.float32
    param = lambda init, *shape: nnx.Param(init(rngs.params(), shape, dtype))
    self.config = config
    self.time_embedding = TimestepEmbedding(width, width, **kw)
    self.proj_in = linear(e, width, **kw)
    self.embedding_proj = linear(config.embedding_proj_dim or e, width, **kw)
    self.encoder_hidden_states_proj = linear(e, width, **kw)
    self.positional_embedding = param(normal(0.01), 1, config.num_embeddings + 4, width)
    self.prd_embedding = param(normal(0.01), 1, 1, width)
    blocks = [CausalBlock(config, **kw) for _ in range(config.num_layers)]
    self.transformer_blocks = nnx.List(blocks)
    self.norm_out = LayerNorm(width, **kw)
    self.proj_to_clip_embeddings = linear(width, e, **kw)
    self.clip_mean = param(nnx.initializers.zeros, 1, e)
    self.clip_std = param(nnx.initializers.ones, 1, e)

  def __call__(self, x: jax.Array, t: Timesteps, condition: Condition) -> jax.Array:
    b, e = len(x), self.config.embedding_dim
    require(x.shape == (b, e), f'The input must have shape [{b} {e}], not {list(x.shape)}.')
    self.check_conditions(b, condition)
    return self.run_all(self._all, x, t, condition)

  def _all(self, x: jax.Array, t: Timesteps, condition: Condition) -> jax.Array:
    b, dtype = len(x), x.dtype
    time = self.time_embedding(timestep_embedding(t, self.config.width).astype(dtype))
    text = self.encoder_hidden_states_proj(condition.text.astype(dtype))
    one = lambda part: part[:, None]
    last = jnp.broadcast_to(self.prd_embedding[...], (b, 1, self.config.width)).astype(dtype)
    y = jnp.concatenate([
      text, one(self.embedding_proj(condition.pooled.astype(dtype))), one(time),
      one(self.proj_in(x)), last,
    ], axis=1)
    y = y + self.positional_embedding[...].astype(dtype)
    count = y.shape[1]
    seen = jnp.tril(jnp.ones((1, count, count), bool))
    if condition.mask is not None:
      real = jnp.pad(condition.mask != 0, ((0, 0), (0, 4)), constant_values=True)
      seen = seen & real[:, None]
    seen = jnp.broadcast_to(seen, (b, count, count))
    for block in self.transformer_blocks:
      y = self.run(block, y, seen)
    return self.proj_to_clip_embeddings(self.norm_out(y[:, -1]))
