"""Attention and transformer blocks with the names and conventions of diffusers.

Softmax is taken in float32. Feed-forward layers use GEGLU (Shazeer 2020) with the exact GELU.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.attend import Attends
from diffusion_jax.models.checks import require
from diffusion_jax.models.layers import linear, pointwise
from diffusion_jax.models.norms import GroupNorm, LayerNorm
from diffusion_jax.models.remat import Blocks


class Nothing(nnx.Module):
  """Keeps the place of a layer without parameters (dropout) in a numbered list."""


class Attention(Attends):
  """Multi-head attention (Vaswani et al. 2017, eq. 1): x [b n c], context [b l d] -> [b n c].

  Without a context it attends to x itself. In the U-Net q, k and v have no bias; in the
  autoencoder they do.
  """

  def __init__(
    self, features: int, *, heads: int, context_features: int | None = None,
    qkv_bias: bool = False, **kw,
  ):
    require(features % heads == 0, f'{heads} attention heads do not divide {features} channels.')
    source = features if context_features is None else context_features
    self.to_q = linear(features, features, use_bias=qkv_bias, **kw)
    self.to_k = linear(source, features, use_bias=qkv_bias, **kw)
    self.to_v = linear(source, features, use_bias=qkv_bias, **kw)
    self.to_out = nnx.List([linear(features, features, **kw)])
    self.heads = heads

  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    context = x if context is None else context
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
    y = self.attend(q, k, v)
    return constrain(self.to_out[0](y.reshape(*y.shape[:-2], -1)), 'tokens')


class SpatialAttention(Attention):
  """Residual single-head self-attention over all positions, [b h w c]; the autoencoder's."""

  def __init__(self, features: int, *, groups: int, epsilon: float, **kw):
    super().__init__(features, heads=1, qkv_bias=True, **kw)
    self.group_norm = GroupNorm(groups, features, epsilon, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    return x + super().__call__(self.group_norm(x).reshape(b, h * w, c)).reshape(x.shape)


class GEGLU(nnx.Module):
  """x W_a * gelu(x W_b) with biases (Shazeer 2020, eq. 6)."""

  def __init__(self, in_features: int, out_features: int, **kw):
    self.proj = linear(in_features, 2 * out_features, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    value, gate = jnp.split(self.proj(x), 2, axis=-1)
    gate = jax.nn.gelu(constrain(gate, 'hidden'), approximate=False)
    return constrain(value, 'hidden') * gate


class FeedForward(nnx.Module):
  """GEGLU to 4 times the width and back: [b n c] -> [b n c]."""

  def __init__(self, features: int, **kw):
    hidden = 4 * features
    self.net = nnx.List(
      [GEGLU(features, hidden, **kw), Nothing(), linear(hidden, features, **kw)]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.net[2](self.net[0](x)), 'tokens')


class BasicTransformerBlock(nnx.Module):
  """Self-attention, attention to the text, feed-forward; each pre-normed and residual.

  x [b n c], text [b l d] -> [b n c] (Rombach et al. 2022, appendix E.2.1). `only_text`: the first
  attention is to the text as well, so that positions do not see each other (the x4 upscaler).
  """

  def __init__(
    self, features: int, *, heads: int, context_features: int, only_text: bool = False, **kw
  ):
    self.norm1 = LayerNorm(features, **kw)
    source = context_features if only_text else None
    self.attn1 = Attention(features, heads=heads, context_features=source, **kw)
    self.norm2 = LayerNorm(features, **kw)
    self.attn2 = Attention(features, heads=heads, context_features=context_features, **kw)
    self.norm3 = LayerNorm(features, **kw)
    self.ff = FeedForward(features, **kw)
    self.only_text = only_text

  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    x = x + self.attn1(self.norm1(x), text if self.only_text else None)
    x = x + self.attn2(self.norm2(x), text)
    return x + self.ff(self.norm3(x))


class Transformer2DModel(Blocks):
  """Transformer over the positions of a feature map: x [b h w c], text [b l d] -> [b h w c].

  `linear_projection` only decides how proj_in and proj_out are stored: dense [c c] as in SD2, or
  1x1 convolution [1 1 c c] as in SD1; the computation is the same.
  """

  def __init__(
    self, channels: int, *, heads: int, depth: int, context_features: int, groups: int,
    linear_projection: bool, only_text: bool = False, **kw,
  ):
    project = linear if linear_projection else pointwise
    self.norm = GroupNorm(groups, channels, 1e-6, **kw)
    self.proj_in = project(channels, channels, **kw)
    self.transformer_blocks = nnx.List([
      BasicTransformerBlock(
        channels, heads=heads, context_features=context_features, only_text=only_text, **kw
      )
      for _ in range(depth)
    ])
    self.proj_out = project(channels, channels, **kw)

  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    y = self.run(self._tokens, x)
    for block in self.transformer_blocks:
      y = self.run(block, y, text)
    return constrain(x + self.proj_out(y.reshape(x.shape)), 'image')

  def _tokens(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    return constrain(self.proj_in(self.norm(x)).reshape(b, h * w, c), 'tokens')
