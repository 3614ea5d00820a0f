"""The class-conditional diffusion transformer with adaLN-zero (Peebles & Xie 2023).

Names are those of diffusers' DiTTransformer2DModel. Other transformer denoisers share patches,
positions, modulation and feed-forward layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.models.attention import GELU, Attention, FeedForward
from diffusion_jax.models.config import Edge, Epsilon, Layers, NetworkConfig, Width
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.layers import (
  Conv,
  Named,
  TimestepEmbedding,
  embed,
  linear,
  timestep_embedding,
)
from diffusion_jax.models.norms import normalize
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Timesteps

zeros = nnx.initializers.zeros_init()


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """x (1 + scale) + shift (Perez et al. 2018, eq. 1): x [b n c], shift and scale [b 1 c]."""
  return x * (1 + scale) + shift


class Modulation(nnx.Module):
  """Condition [b c] -> `parts` arrays [b 1 c] of shifts, scales and gates, all zero at first.

  So every block starts as the identity: adaLN-zero (Peebles & Xie 2023, sec. 3.2).
  """

  def __init__(self, features: int, parts: int, **kw):
    self.linear = linear(features, parts * features, init=zeros, **kw)
    self.parts = parts

  def __call__(self, condition: jax.Array) -> list[jax.Array]:
    return jnp.split(self.linear(nnx.silu(condition))[:, None], self.parts, axis=-1)


def sincos_positions(rows: np.ndarray, columns: np.ndarray, features: int) -> jax.Array:
  """Sinusoids of positions in the plane, float32: [h] and [w] -> [h w features].

  The first half of the features is of the column, the second of the row; each is sines, then
  cosines, of frequencies 10000^(-4i/features) (Vaswani et al. 2017, sec. 3.5), a multiple of 4
  features.
  """
  def along(positions: np.ndarray) -> jax.Array:
    frequencies = 10_000.0 ** -(np.arange(features // 4) / (features // 4))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)

  shape = (len(rows), len(columns), features // 2)
  column, row = along(columns)[None], along(rows)[:, None]
  return jnp.concatenate([jnp.broadcast_to(column, shape), jnp.broadcast_to(row, shape)], -1)


def grid_positions(cells: int, trained_cells: int) -> np.ndarray:
  """Return where `cells` patches lie along an axis that had `trained_cells` in training."""
  # In float32, and divided twice, as in the published code: its rounding is part of the table.
  return np.arange(cells, dtype=np.float32) / np.float32(cells / trained_cells)


def unpatch(x: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
  """Tokens [b h*w patch*patch*c] -> image [b h*patch w*patch c]."""
  h, w = grid
  x = x.reshape(x.shape[0], h, w, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(x.shape[0], h * patch, w * patch, -1)


SINUSOIDS = 256


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
  """Common config of denoisers of patches; the keys are those of diffusers.

  sample_size: side of the training latents. out_channels None: in_channels.
  """

  sample_size: Edge = 32
  patch_size: Edge = 2
  in_channels: Width = 4
  out_channels: Width | None = None
  num_layers: Layers = 28
  attention_head_dim: Width = 72
  num_attention_heads: Width = 16

  def check(self) -> None:
    heads = f'must make with attention_head_dim={self.attention_head_dim} a width that is a '
    fits = self.features % 4 == 0 and self.features <= 2**20
    self.require(
      fits, 'num_attention_heads', f'{heads}multiple of 4 up to 2^20, not {self.features:,}'
    )
    self.require(
      self.sample_size % self.patch_size == 0, 'sample_size',
      f'must be a multiple of patch_size={self.patch_size}',
    )

  @property
  def features(self) -> int:
    """Width of a token."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def factor(self) -> int:
    """Height and width of the latents must be multiples of this."""
    return self.patch_size

  @property
  def patch_features(self) -> int:
    """Width of what a token becomes: a patch of the result."""
    return self.patch_size**2 * (self.out_channels or self.in_channels)


@dataclasses.dataclass(frozen=True)
class DiTConfig(TransformerConfig):
  """The keys of a diffusers DiTTransformer2DModel config.json; the defaults are DiT-XL/2's at 256.

  num_embeds_ada_norm: number of classes. out_channels: 2 * in_channels with predicted variances.
  shared_embedding (ours): one embedding of time and label for all blocks, as in the paper;
  diffusers keeps a copy in every block.
  """

  out_channels: Width | None = 8
  attention_bias: bool = True
  num_embeds_ada_norm: Width = 1000
  norm_eps: Epsilon = 1e-5
  shared_embedding: bool = True

  @property
  def conditions(self) -> Shapes:
    """A class in [0, num_embeds_ada_norm], the last for none."""
    return {'labels': ()}


class TimeAndLabel(nnx.Module):
  """t [b], labels [b] -> the condition [b c]."""

  def __init__(self, config: DiTConfig, **kw):
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, config.features, **kw)
    # The last row is that of no class.
    init = nnx.initializers.normal(0.02)
    table = embed(config.num_embeds_ada_norm + 1, config.features, init, **kw)
    self.class_embedder = Named(embedding_table=table)

  def __call__(self, t: jax.Array, labels: jax.Array) -> jax.Array:
    sinusoids = timestep_embedding(t, SINUSOIDS, freq_shift=1.0)
    return self.timestep_embedder(sinusoids) + self.class_embedder(labels)


class EmbeddedModulation(Modulation):
  """Modulation that may hold the embedding of its condition."""

  def __init__(self, config: DiTConfig, embed: bool, **kw):
    super().__init__(config.features, 6, **kw)
    self.emb = TimeAndLabel(config, **kw) if embed else None


class DiTBlock(nnx.Module):
  """Self-attention and feed-forward, each modulated and gated (Peebles & Xie 2023, figure 3)."""

  def __init__(self, config: DiTConfig, embed: bool, **kw):
    c = config.features
    self.norm1 = EmbeddedModulation(config, embed, **kw)
    self.attn1 = Attention(
      c, heads=config.num_attention_heads, qkv_bias=config.attention_bias, **kw
    )
    self.ff = FeedForward(c, GELU, **kw)
    self.epsilon = config.norm_eps

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """x [b n c], condition [b c] -> [b n c]."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(condition)
    x = x + gate * self.attn1(modulate(normalize(x), shift, scale))
    return x + ff_gate * self.ff(modulate(normalize(x, self.epsilon), ff_shift, ff_scale))


class PatchEmbed(nnx.Module):
  """Patches of [b h w i] -> tokens with their positions, [b n c]; any size of whole patches."""

  def __init__(self, config: TransformerConfig, **kw):
    p = config.patch_size
    self.proj = Conv(config.in_channels, config.features, p, stride=p, padding=0, **kw)
    self.trained = config.sample_size // p

  def positions(self, h: int, w: int, features: int) -> jax.Array:
    """Return those of h x w patches: [h w features]."""
    return sincos_positions(*(grid_positions(n, self.trained) for n in (h, w)), features)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.proj(x)
    b, h, w, c = x.shape
    x = (x + self.positions(h, w, c)).astype(x.dtype)
    return constrain(x.reshape(b, h * w, c), 'tokens')


class DiT(Denoiser):
  """x, time and label -> an array of x's height and width; zero as long as it is untrained."""

  def __init__(self, config: DiTConfig, **kw):
    super().__init__(**kw)
    c = config.features
    self.config = config
    self.pos_embed = PatchEmbed(config, **kw)
    self.transformer_blocks = nnx.List([
      DiTBlock(config, n == 0 or not config.shared_embedding, **kw)
      for n in range(config.num_layers)
    ])
    self.proj_out_1 = linear(c, 2 * c, init=zeros, **kw)
    self.proj_out_2 = linear(c, config.patch_features, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Latents:
    """x [b h w c], t [b] in [0, T), labels [b] in [0, classes] -> [b h w o].

    Label num_embeds_ada_norm is no class. At other sizes than the training's positions are
    stretched along each axis. UserError: see `Denoiser.join`.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition.labels)

  def _predict(self, x: Latents, t: Timesteps, labels: jax.Array) -> Latents:
    p = self.config.patch_size
    grid = x.shape[1] // p, x.shape[2] // p
    x = self.pos_embed(x)
    first = condition = self.transformer_blocks[0].norm1.emb(t, labels)
    for block in self.transformer_blocks:
      if block.norm1.emb is not None:
        condition = block.norm1.emb(t, labels)
      x = self.run(block, x, condition)
    shift, scale = jnp.split(self.proj_out_1(nnx.silu(first))[:, None], 2, axis=-1)
    return unpatch(self.proj_out_2(modulate(normalize(x), shift, scale)), grid, p)
