"""DINOv2 (Oquab et al. 2023): a ViT trained without labels, without or with registers.

Names and computation follow transformers' Dinov2Model and Dinov2WithRegistersModel. Softmax and
norms are float32.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.limits import Range
from diffusion_jax.models.attention import MultiHead
from diffusion_jax.models.config import Edge, Epsilon, Shift, Width
from diffusion_jax.models.layers import Conv, Named
from diffusion_jax.models.network import PLAIN, Blocks, Compute
from diffusion_jax.models.norms import LayerNorm
from diffusion_jax.models.text.clip import CLIPMLP, Activation, TowerConfig, dense
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Images

STD = 0.02
"""Standard deviation of fresh weights; the paper's code truncates them."""


@dataclasses.dataclass(frozen=True)
class DINOv2Config(TowerConfig):
  """Keys of transformers' config.json; the defaults are those of ViT-B/14.

  image_size: of training, in pixels, 518 for published models; other sizes interpolate positions.
  num_register_tokens: 0 without registers (Darcet et al. 2024).
  """

  hidden_size: Width = 768
  num_attention_heads: Width = 12
  mlp_ratio: Width = 4
  hidden_act: Activation = 'gelu'
  layer_norm_eps: Epsilon = 1e-6
  image_size: Edge = 518
  patch_size: Edge = 14
  num_channels: Width = 3
  qkv_bias: bool = True
  layerscale_value: Shift = 1.0
  use_swiglu_ffn: bool = False
  use_mask_token: bool = True
  num_register_tokens: Annotated[int, Range(0, 2**20)] = 0

  def check(self) -> None:
    super().check()
    self.require(
      self.image_size >= self.patch_size, 'image_size', f'must hold a patch of {self.patch_size}'
    )
    self.require(
      self.num_register_tokens == 0 or self.use_mask_token, 'use_mask_token',
      'must be true with registers: their files always hold the token',
    )

  @property
  def intermediate_size(self) -> int:
    """Width within a feed-forward layer; of SwiGLU two thirds, up to a multiple of 8."""
    width = self.hidden_size * self.mlp_ratio
    return -(-(width * 2 // 3) // 8) * 8 if self.use_swiglu_ffn else width


def _cubic_matrix(size: int, out: int) -> np.ndarray:
  """[out size]: PyTorch's bicubic interpolation (a = -3/4), no antialiasing, edges repeated."""
  a, source = -0.75, (np.arange(out) + 0.5) * size / out - 0.5
  low = np.floor(source).astype(np.int64)
  matrix = np.zeros((out, size))
  for tap in range(-1, 3):
    x = np.abs(source - (low + tap))
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    np.add.at(
      matrix, (np.arange(out), np.clip(low + tap, 0, size - 1)), np.where(x <= 1, near, far)
    )
  return matrix.astype(np.float32)


def interpolated(table: jax.Array, grid: tuple[int, int], antialias: bool) -> jax.Array:
  """Positions of a square of patches [n d], at another grid (h, w), bicubic, float32: [h*w d]."""
  side, d = round(len(table) ** 0.5), table.shape[-1]
  square = table.astype(jnp.float32).reshape(side, side, d)
  if antialias:  # With a = -1/2, as in Pillow.
    square = jax.image.resize(square, (*grid, d), 'cubic', precision='highest')
  else:
    rows, columns = (_cubic_matrix(side, cells) for cells in grid)
    square = jnp.einsum('hi,wj,ijd->hwd', rows, columns, square, precision='highest')
  return square.reshape(-1, d)


class DINOv2Embeddings(nnx.Module):
  """CLS token, registers, patches and positions: pixels [b h w c] -> [b 1+r+n d]."""

  def __init__(self, config: DINOv2Config, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    kw = dict(compute=compute, rngs=rngs)
    d, self.config = config.hidden_size, config
    init = nnx.initializers.normal(STD)
    fresh = lambda *shape: nnx.Param(init(rngs.params(), shape, compute.param_dtype))
    self.cls_token = fresh(1, 1, d)
    # Training alone puts it in the place of patches; here it is kept, so that files stay whole.
    masked = nnx.Param(jnp.zeros((1, d), compute.param_dtype)) if config.use_mask_token else None
    self.mask_token = masked
    p = config.patch_size
    patches = Conv(config.num_channels, d, p, stride=p, padding=0, **kw)
    self.patch_embeddings = Named(projection=patches)
    self.position_embeddings = fresh(1, 1 + (config.image_size // config.patch_size) ** 2, d)
    registers = config.num_register_tokens
    self.register_tokens = fresh(1, registers, d) if registers else None

  def __call__(self, pixels: Images) -> jax.Array:
    patches = self.patch_embeddings(pixels)
    b, h, w, d = patches.shape
    side = self.config.image_size // self.config.patch_size
    table = self.position_embeddings[...][0]
    first, rest = table[:1], table[1:]
    if (h, w) != (side, side):
      rest = interpolated(rest, (h, w), antialias=self.register_tokens is not None)
    spread = lambda token: jnp.broadcast_to(token.astype(patches.dtype), (b, *token.shape[1:]))
    parts = [
      spread(self.cls_token[...] + first[None]),
      patches.reshape(b, h * w, d) + rest.astype(patches.dtype),
    ]
    if self.register_tokens is not None:  # Between both, without a position.
      parts.insert(1, spread(self.register_tokens[...]))
    return constrain(jnp.concatenate(parts, axis=1), 'tokens')


class SelfAttention(MultiHead):
  """Queries, keys and values of a multi-head attention to itself: [b l d] -> [b l d]."""

  def __init__(self, config: DINOv2Config, **kw):
    super().__init__(config.num_attention_heads, **kw)
    make = lambda: dense(
      config.hidden_size, config.hidden_size, STD, use_bias=config.qkv_bias, **kw
    )
    self.query, self.key, self.value = make(), make(), make()

  def __call__(self, x: jax.Array) -> jax.Array:
    q, k, v = (self.by_head(part(x)) for part in (self.query, self.key, self.value))
    return self.attend(q, k, v)


class DINOv2Attention(nnx.Module):
  """Multi-head self-attention, in the two parts that files name: [b l d] -> [b l d]."""

  def __init__(self, config: DINOv2Config, **kw):
    self.attention = SelfAttention(config, **kw)
    self.output = Named(dense=dense(config.hidden_size, config.hidden_size, STD, **kw))

  def __call__(self, x: jax.Array) -> jax.Array:
    return constrain(self.output(self.attention(x)), 'tokens')


class SwiGLU(nnx.Module):
  """(silu(x A) * (x B)) C with biases (Shazeer 2020, eq. 6); A and B are stored as one matrix."""

  def __init__(self, config: DINOv2Config, **kw):
    d, hidden = config.hidden_size, config.intermediate_size
    self.weights_in = dense(d, 2 * hidden, STD, **kw)
    self.weights_out = dense(hidden, d, STD, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate, value = jnp.split(self.weights_in(x), 2, axis=-1)
    hidden = nnx.silu(constrain(gate, 'hidden')) * constrain(value, 'hidden')
    return constrain(self.weights_out(hidden), 'tokens')


class LayerScale(nnx.Module):
  """A learned gain of each channel (Touvron et al. 2021, eq. 5)."""

  def __init__(self, config: DINOv2Config, *, compute: Compute = PLAIN, rngs: nnx.Rngs):
    del rngs
    scale = jnp.full((config.hidden_size,), config.layerscale_value, compute.param_dtype)
    self.lambda1 = nnx.Param(scale)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x * self.lambda1[...].astype(x.dtype)


class DINOv2Layer(nnx.Module):
  """Pre-norm transformer block whose branches are scaled: [b l d] -> [b l d]."""

  def __init__(self, config: DINOv2Config, **kw):
    d, eps = config.hidden_size, config.layer_norm_eps
    self.norm1 = LayerNorm(d, eps, **kw)
    self.attention = DINOv2Attention(config, **kw)
    self.layer_scale1 = LayerScale(config, **kw)
    self.norm2 = LayerNorm(d, eps, **kw)
    self.mlp = (SwiGLU if config.use_swiglu_ffn else CLIPMLP)(config, **kw)
    self.layer_scale2 = LayerScale(config, **kw)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.layer_scale1(self.attention(self.norm1(x)))
    return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DINOv2Encoder(Blocks):
  """The stack of blocks: [b l d] -> [b l d]."""

  def __init__(self, config: DINOv2Config, **kw):
    super().__init__(**kw)
    self.layer = nnx.List([DINOv2Layer(config, **kw) for _ in range(config.num_hidden_layers)])

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.run_all(self._all, x)

  def _all(self, x: jax.Array) -> jax.Array:
    for layer in self.layer:
      x = self.run(layer, x)
    return x


class DINOv2(nnx.Module):
  """The whole network; pixels are normalised by ImageNet's mean and deviation."""

  def __init__(self, config: DINOv2Config, **kw):
    self.config = config
    self.embeddings = DINOv2Embeddings(config, **kw)
    self.encoder = DINOv2Encoder(config, **kw)
    self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(self, pixels: Images) -> jax.Array:
    """Pixels [b h w c] -> tokens after the last norm [b 1+r+n d]: CLS, registers, patches.

    UserError unless height and width are multiples of the patch size.
    """
    c, p = self.config.num_channels, self.config.patch_size
    require(
      pixels.ndim == 4 and pixels.shape[-1] == c and min(pixels.shape[1:3]) >= p
      and pixels.shape[1] % p == 0 and pixels.shape[2] % p == 0,
      f'DINOv2 takes images [b h w {c}] whose height and width are multiples of {p}, not '
      f'{list(pixels.shape)}; resize them.',
    )
    return self.layernorm(self.encoder(self.embeddings(pixels)))

  def encode_image(self, pixels: Images) -> jax.Array:
    """Pixels [b h w c] -> the CLS token after the last norm [b d]."""
    return self(pixels)[:, 0]
