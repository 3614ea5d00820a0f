"""Scaled dot-product attention by several ways, and the transformer blocks made with it.

Each way takes q [b n h d], k and v [b l h d] to [b n h d] and has a gradient; softmax is float32.
Blocks have the names and conventions of diffusers: GEGLU (Shazeer 2020) with the exact GELU.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from diffusion_jax.backend.xla import Capability, chip
from diffusion_jax.errors import require
from diffusion_jax.models.kernels import chunked, splash
from diffusion_jax.models.layers import Function, in_turn, kernel_init, linear, pointwise
from diffusion_jax.models.network import PLAIN, Blocks, Compute
from diffusion_jax.models.norms import GroupNorm, LayerNorm, RMSNorm
from diffusion_jax.models.rotary import Rotation, rotate
from diffusion_jax.parallel.layout import constrain, on_each_device

SHORT, LONG, LARGE = 128, 4096, 2**26
"""Lengths up to which a kernel does not pay, and from which it does; logits of one head."""


class Masked(NamedTuple):
  """A context [b l d], and [b l], 1 where it is attended to and 0 at its padding."""

  context: jax.Array
  mask: jax.Array


def masked(text: jax.Array, mask: jax.Array | None) -> jax.Array | Masked:
  """Return the text, with its mask where there is one."""
  return text if mask is None else Masked(text, mask)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """All logits at once, softmax in float32; XLA splits it over a mesh by itself.

  `mask` [b l] is 0 for keys that no query sees; some key of every example must be seen.
  """
  mask = None if mask is None else (mask != 0)[:, None, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='xla')


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = 'cudnn') -> jax.Array:
  """FlashAttention (Dao 2023) of cuDNN; odd lengths, without gradient in JAX, are padded by one."""
  n, keys = q.shape[1], k.shape[1]
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  y = jax.nn.dot_product_attention(
    even(q), even(k), even(v), implementation=implementation,
    key_value_seq_lengths=jnp.full(len(k), keys, jnp.int32) if keys % 2 else None,
  )
  return y[:, :n]


WAYS = {'xla': xla, 'cudnn': cudnn, 'splash': splash, 'chunked': chunked}


def attend_by(name: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Return attention by that way; on a mesh each device computes its part, unless XLA splits it."""
  if name == 'xla':
    return xla(q, k, v)
  # XLA cannot split the programs within kernels; cuDNN's have a rule, but not for split queries.
  kernel = name != 'chunked'
  return on_each_device(WAYS[name], ('queries', 'keys', 'keys'), 'queries', whole=kernel)(q, k, v)


def refusal(
  name: str, platform: str, capability: Capability, dtype: jnp.dtype, d: int | None = None
) -> str:
  """Return why that way cannot serve, and what to do; '' where it can. d None: whatever heads."""
  if name == 'splash':
    if platform != 'tpu':
      return f'it needs a TPU, and here is {platform}; set attention to auto'
    # As far as JAX tests it: blocks of wider heads may not fit into a core.
    if d is not None and d > 256:
      return f'it takes heads of up to 256 channels, not {d}; set attention to auto'
  if name == 'cudnn':
    if capability is None or capability < (8, 0):
      found = '.'.join(map(str, capability or (platform,)))
      return (
        f'it needs an NVIDIA GPU of compute capability 8.0 or more, and here is {found}; set '
        'attention to auto'
      )
    if dtype not in (jnp.bfloat16, jnp.float16):
      return f'it does not compute in {jnp.dtype(dtype).name}; set dtype to bfloat16'
    largest = 256 if capability >= (9, 0) else 128
    if d is not None and (d % 8 or d > largest):
      return (
        f'it takes heads of a multiple of 8 channels up to {largest}, not {d}; set attention to '
        'auto'
      )
  return ''


def choose(
  platform: str, capability: Capability, dtype: jnp.dtype, n: int, keys: int, d: int
) -> str:
  """Return the name of the way for n queries and so many keys, both of d channels."""
  serves = lambda name: not refusal(name, platform, capability, dtype, d)
  # At the sizes of the recipes here up to five times as fast as XLA, which writes all logits to
  # memory (docs/speed.md).
  if platform == 'cpu':
    return 'chunked'
  # Against so few, such as the 77 tokens of a text, logits are about as large as the inputs, and
  # kernels, which take 128 at a time, would compute much that is thrown away.
  if min(n, keys) <= SHORT:
    return 'xla'
  # 12 bytes of memory for each logit and weight, written and read, take an A100 or later several
  # times as long as the 4 d FLOPs.
  if serves('cudnn'):
    return 'cudnn'
  # The limit that MaxDiffusion gives for TPUs (flash_min_seq_length): at short lengths what the
  # kernel takes besides its products counts.
  if min(n, keys) >= LONG and serves('splash'):
    return 'splash'
  # No kernel serves, as in an autoencoder, whose one head is as wide as its channels. The logits
  # of each image would take 256 MB or more, some times over: memory counts before speed.
  if n * keys >= LARGE:
    return 'chunked'
  return 'xla'


class MultiHead(nnx.Module):
  """A module with multi-head attention that has no bias."""

  heeds = 'attention'

  def __init__(self, heads: int, *, compute: Compute = PLAIN, rngs: nnx.Rngs | None = None):
    del rngs
    self.heads, self.attention = heads, compute.attention

  def by_head(self, x: jax.Array) -> jax.Array:
    """[b n c] -> [b n h d]."""
    return x.reshape(*x.shape[:-1], self.heads, -1)

  def attend(
    self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """q [b n h d], k and v [b l h d], mask [b l] -> [b n c], by this module's way."""
    y = attend(q, k, v, self.attention, mask)
    return y.reshape(*y.shape[:-2], -1)


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, attention: str = 'auto', mask: jax.Array | None = None
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), softmax in float32.

  q [b n h d], k and v [b l h d] -> [b n h d]. `attention` is one of `network.ATTENTION`. Keys whose
  `mask` [b l] is 0 are not seen; with a mask XLA computes all logits, whatever `attention` is.

  Raises:
    UserError: the way cannot serve on this platform, in this type or for heads of this size.
  """
  q, k, v = constrain(q, 'queries'), constrain(k, 'keys'), constrain(v, 'keys')
  return constrain(scaled_dot_product_attention(q, k, v, attention, mask), 'queries')


@partial(jax.jit, static_argnums=3)
def scaled_dot_product_attention(  # By this name programs show it; its FLOPs are of a formula.
  q: jax.Array, k: jax.Array, v: jax.Array, attention: str = 'auto', mask: jax.Array | None = None
) -> jax.Array:
  """Return `attend` of arrays as they lie."""
  if mask is not None:
    return xla(q, k, v, mask)
  d = q.shape[-1]
  if attention == 'auto':
    attention = choose(*chip(), q.dtype, q.shape[1], k.shape[1], d)
  else:
    check_attention(attention, q.dtype, d)
  return attend_by(attention, q, k, v)


def check_attention(
  attention: str, dtype: jnp.dtype, d: int | None = None, mesh: Mesh | None = None
) -> None:
  """Raise UserError where that way cannot serve heads of d channels, or any, on the mesh."""
  why = refusal(attention, *chip(mesh), dtype, d)
  require(not why, f'attention {attention!r} cannot serve here: {why}.')


class Attention(MultiHead):
  """Multi-head attention (Vaswani et al. 2017, eq. 1): x [b n c], context [b l d] -> [b n c].

  Without a context it attends to x itself. In the U-Net q, k and v have no bias; in the
  autoencoder they do. `qk_norm`: queries and keys are normalised by head (Henry et al. 2020).
  Where `perturbed` is set, each position attends to itself alone (Ahn et al. 2024); attention to a
  context stays.
  """

  perturbed = False

  def __init__(
    self, features: int, *, heads: int, context_features: int | None = None,
    qkv_bias: bool = False, qk_norm: bool = False, out_init=kernel_init, **kw,
  ):
    super().__init__(heads, **kw)
    require(features % heads == 0, f'{heads} attention heads do not divide {features} channels.')
    source = features if context_features is None else context_features
    self.to_q = linear(features, features, use_bias=qkv_bias, **kw)
    self.to_k = linear(source, features, use_bias=qkv_bias, **kw)
    self.to_v = linear(source, features, use_bias=qkv_bias, **kw)
    self.to_out = nnx.List([linear(features, features, init=out_init, **kw)])
    norm = lambda: RMSNorm(features // heads, 1e-6, **kw) if qk_norm else None
    self.norm_q, self.norm_k = norm(), norm()

  def __call__(
    self, x: jax.Array, context: jax.Array | Masked | None = None, rotary: Rotation | None = None
  ) -> jax.Array:
    """`rotary` turns queries and keys."""
    context, mask = context if isinstance(context, Masked) else (context, None)
    if self.perturbed and context is None:
      return constrain(self.to_out[0](self.to_v(x)), 'tokens')
    context = x if context is None else context
    q, k = self.by_head(self.to_q(x)), self.by_head(self.to_k(context))
    if self.norm_q is not None:
      q, k = self.norm_q(q), self.norm_k(k)
    if rotary is not None:
      q, k = rotate(q, rotary), rotate(k, rotary)
    y = self.attend(q, k, self.by_head(self.to_v(context)), mask)
    return constrain(self.to_out[0](y), 'tokens')


class SpatialAttention(Attention):
  """Residual self-attention over all positions, [b h w c]; the autoencoder's has one head."""

  def __init__(self, features: int, *, groups: int, epsilon: float, heads: int = 1, **kw):
    super().__init__(features, heads=heads, qkv_bias=True, **kw)
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


class GELU(nnx.Module):
  """GELU in its tanh approximation (Hendrycks & Gimpel 2016, sec. 2) of a dense layer."""

  def __init__(self, in_features: int, out_features: int, **kw):
    self.proj = linear(in_features, out_features, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(constrain(self.proj(x), 'hidden'), approximate=True)


class FeedForward(nnx.Module):
  """An activation at 4 times the width and back: [b n c] -> [b n c]."""

  def __init__(self, features: int, activation: type[GEGLU | GELU] = GEGLU, **kw):
    hidden = 4 * features
    first, last = activation(features, hidden, **kw), linear(hidden, features, **kw)
    self.net = nnx.List([first, Function(), last])

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(in_turn(self.net, x), 'tokens')


class BasicTransformerBlock(nnx.Module):
  """Self-attention, attention to the text, feed-forward; each pre-normed and residual.

  x [b n c], text [b l d] -> [b n c] (Rombach et al. 2022, appendix E.2.1). only_text: the first is
  cross-attention, too (the x4 upscaler).
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

  def __call__(self, x: jax.Array, text: jax.Array | Masked) -> jax.Array:
    x = x + self.attn1(self.norm1(x), text if self.only_text else None)
    x = x + self.attn2(self.norm2(x), text)
    return x + self.ff(self.norm3(x))


class Transformer2DModel(Blocks):
  """Transformer over the positions of a feature map: x [b h w c], text [b l d] -> [b h w c].

  linear_projection: proj_in and proj_out are stored dense [c c] as in SD2, or as 1x1 convolutions
  [1 1 c c] as in SD1; the computation is the same.
  """

  def __init__(
    self, channels: int, *, heads: int, depth: int, context_features: int, groups: int,
    linear_projection: bool, only_text: bool = False, **kw,
  ):
    super().__init__(**kw)
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

  def __call__(self, x: jax.Array, text: jax.Array | Masked) -> jax.Array:
    y = self.run(self._tokens, x)
    for block in self.transformer_blocks:
      y = self.run(block, y, text)
    return constrain(x + self.proj_out(y.reshape(x.shape)), 'image')

  def _tokens(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    return constrain(self.proj_in(self.norm(x)).reshape(b, h * w, c), 'tokens')
