"""The diffusion transformer with adaLN-zero (Peebles & Xie 2023), of classes and of texts.

Names are those of diffusers' DiTTransformer2DModel. Attention to a text (Chen et al. 2023), long
skips (Bao et al. 2023) and other positions than its are ours. Patches, positions, modulation and
feed-forward layers serve the other transformer denoisers, too.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.models.attention import GELU, Attention, FeedForward, Masked, masked
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
from diffusion_jax.models.network import PLAIN
from diffusion_jax.models.norms import normalize
from diffusion_jax.models.rotary import Rotation, in_plane
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Timesteps

zeros = nnx.initializers.zeros_init()
INTERVAL = 'interval'
"""The field of a condition, among its `more`, with the time until the next step [b]."""


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
INTERVAL_SCALE = 1000.0
"""Intervals are embedded as timesteps of a thousand are."""
Positions = Literal['sincos', 'learned', 'rotary']
"""Fixed sinusoids, or a table that is learned, are added to patches; or their queries and keys are
turned (`models.rotary`)."""


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

  positions = 'sincos'

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
    self.require(
      self.positions != 'rotary' or self.attention_head_dim % 4 == 0, 'attention_head_dim',
      'must with rotary positions be a multiple of 4',
    )

  @property
  def features(self) -> int:
    """Width of a token."""
    return self.num_attention_heads * self.attention_head_dim

  def rotary(self, h: int, w: int) -> Rotation | None:
    """Return what turns the queries and keys of h x w patches."""
    return in_plane(h, w, self.attention_head_dim) if self.positions == 'rotary' else None

  @property
  def factor(self) -> int:
    """Height and width of the latents must be multiples of this."""
    return self.patch_size

  @property
  def patch_features(self) -> int:
    """Width of what a token becomes: a patch of the result."""
    return self.patch_size**2 * (self.out_channels or self.in_channels)


OPTIONS = ('cross_attention_dim', 'positions', 'qk_norm', 'long_skips', 'interval')
"""Keys of DiTConfig that diffusers does not have."""


@dataclasses.dataclass(frozen=True)
class DiTConfig(TransformerConfig):
  """The keys of a diffusers DiTTransformer2DModel config.json; the defaults are DiT-XL/2's at 256.

  `num_embeds_ada_norm` is the number of classes, None for a network without; `out_channels` is
  2 * in_channels where the network predicts variances too. The others are ours. `shared_embedding`:
  one embedding of time and label for all blocks, as in the paper; diffusers keeps a copy in every
  block. `cross_attention_dim`: the width of the text, None for a network without. `long_skips`:
  blocks of the second half see the results of those of the first, in reverse, as a U-Net's do.
  `interval`: it is told how far it is to go, too, and gives the mean velocity on the way (Geng et
  al. 2025); told nothing, that is no way at all.
  """

  out_channels: Width | None = 8
  attention_bias: bool = True
  num_embeds_ada_norm: Width | None = 1000
  norm_eps: Epsilon = 1e-5
  shared_embedding: bool = True
  cross_attention_dim: Width | None = None
  positions: Positions = 'sincos'
  qk_norm: Literal['rms_norm'] | None = None
  long_skips: bool = False
  interval: bool = False

  def check(self) -> None:
    super().check()
    self.require(
      not self.long_skips or self.num_layers in range(3, 2**20, 2), 'num_layers',
      'must with long_skips be odd, and more than 1',
    )
    self.require(
      self.shared_embedding or not (self.num_embeds_ada_norm is None or self.added()),
      'shared_embedding', 'must be True where diffusers has no such network',
    )

  def added(self) -> dict[str, object]:
    """Return those options, with their values, that diffusers does not have."""
    found = {name: getattr(self, name) for name in OPTIONS}
    return {name: value for name, value in found.items() if value != getattr(DiTConfig, name)}

  @property
  def conditions(self) -> Shapes:
    """What a call must be conditioned on: text, a class; num_embeds_ada_norm is that of none."""
    text, classes = self.cross_attention_dim, self.num_embeds_ada_norm
    return ({} if text is None else {'text': (None, text)}) | (
      {} if classes is None else {'labels': ()}
    )


class TimeAndLabel(nnx.Module):
  """t [b], labels [b] where there are classes, interval [b] in [0, 1] -> the condition [b c].

  An untrained interval adds nothing, so that a network which is given one begins as it was.
  """

  def __init__(self, config: DiTConfig, **kw):
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, config.features, **kw)
    classes, init = config.num_embeds_ada_norm, nnx.initializers.normal(0.02)
    # The last row is that of no class.
    self.class_embedder = None if classes is None else Named(
      embedding_table=embed(classes + 1, config.features, init, **kw)
    )

    self.interval_embedder = None if not config.interval else TimestepEmbedding(
      SINUSOIDS, config.features, out_init=zeros, **kw
    )

  def __call__(
    self, t: jax.Array, labels: jax.Array | None, interval: jax.Array | None = None
  ) -> jax.Array:
    time = self.timestep_embedder(timestep_embedding(t, SINUSOIDS, freq_shift=1.0))
    if self.interval_embedder is not None:
      way = jnp.zeros_like(t) if interval is None else INTERVAL_SCALE * interval
      time = time + self.interval_embedder(timestep_embedding(way, SINUSOIDS, freq_shift=1.0))
    return time if self.class_embedder is None else time + self.class_embedder(labels)


class EmbeddedModulation(Modulation):
  """Modulation that may hold the embedding of its condition."""

  def __init__(self, config: DiTConfig, embed: bool, **kw):
    super().__init__(config.features, 6, **kw)
    self.emb = TimeAndLabel(config, **kw) if embed else None


class DiTBlock(nnx.Module):
  """Self-attention and feed-forward, each modulated and gated (Peebles & Xie 2023, figure 3).

  Between them, by the config, attention to the text, which like them adds nothing at first.
  `skipped`: the result of an earlier block is taken, too.
  """

  def __init__(self, config: DiTConfig, embed: bool, skipped: bool = False, **kw):
    c, text = config.features, config.cross_attention_dim
    heads = dict(
      heads=config.num_attention_heads, qkv_bias=config.attention_bias,
      qk_norm=config.qk_norm is not None,
    )
    self.norm1 = EmbeddedModulation(config, embed, **kw)
    self.attn1 = Attention(c, **heads, **kw)
    self.attn2 = None if text is None else Attention(
      c, context_features=text, out_init=zeros, **heads, **kw
    )
    self.ff = FeedForward(c, GELU, **kw)
    self.skip_linear = linear(2 * c, c, **kw) if skipped else None
    self.epsilon = config.norm_eps

  def __call__(
    self, x: jax.Array, condition: jax.Array, text: jax.Array | Masked | None = None,
    rotary: Rotation | None = None, skip: jax.Array | None = None,
  ) -> jax.Array:
    """x [b n c], condition [b c], text [b l d], skip [b n c] -> [b n c]."""
    if self.skip_linear is not None:
      x = constrain(self.skip_linear(jnp.concatenate([x, skip], axis=-1)), 'tokens')
    shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(condition)
    x = x + gate * self.attn1(modulate(normalize(x), shift, scale), rotary=rotary)
    if self.attn2 is not None:
      x = x + self.attn2(normalize(x), text)
    return x + ff_gate * self.ff(modulate(normalize(x, self.epsilon), ff_shift, ff_scale))


class PatchEmbed(nnx.Module):
  """Patches of [b h w i] -> tokens with their positions, [b n c]; any size of whole patches."""

  def __init__(self, config: TransformerConfig, **kw):
    p = config.patch_size
    self.proj = Conv(config.in_channels, config.features, p, stride=p, padding=0, **kw)
    self.trained = config.sample_size // p

  def places(self, cells: int) -> np.ndarray:
    """Return where so many patches lie along an axis."""
    return grid_positions(cells, self.trained)

  def positions(self, h: int, w: int, features: int) -> jax.Array:
    """Return those of h x w patches: [h w features]."""
    return sincos_positions(self.places(h), self.places(w), features)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.proj(x)
    b, h, w, c = x.shape
    x = (x + self.positions(h, w, c)).astype(x.dtype)
    return constrain(x.reshape(b, h * w, c), 'tokens')


class LearnedPatchEmbed(PatchEmbed):
  """Patches with learned positions, linearly interpolated for a grid other than that of training.
  """

  def __init__(self, config: TransformerConfig, *, compute=PLAIN, rngs):
    super().__init__(config, compute=compute, rngs=rngs)
    shape = 1, self.trained**2, config.features
    init = nnx.initializers.normal(0.02)
    self.pos_embed = nnx.Param(init(rngs.params(), shape, compute.param_dtype))

  def positions(self, h: int, w: int, features: int) -> jax.Array:
    table = self.pos_embed[...].reshape(self.trained, self.trained, features)
    return jax.image.resize(table, (h, w, features), 'linear', antialias=False)


class PlainPatchEmbed(PatchEmbed):
  """Patches without positions, which attention has."""

  def positions(self, h: int, w: int, features: int) -> float:
    return 0.0


PATCHES = {'sincos': PatchEmbed, 'learned': LearnedPatchEmbed, 'rotary': PlainPatchEmbed}


class DiT(Denoiser):
  """x, time and label -> an array of x's height and width; zero as long as it is untrained."""

  def __init__(self, config: DiTConfig, **kw):
    super().__init__(**kw)
    c = config.features
    self.config = config
    self.pos_embed = PATCHES[config.positions](config, **kw)
    self.transformer_blocks = nnx.List([
      DiTBlock(
        config, n == 0 or not config.shared_embedding,
        config.long_skips and n > config.num_layers // 2, **kw,
      )
      for n in range(config.num_layers)
    ])
    self.proj_out_1 = linear(c, 2 * c, init=zeros, **kw)
    self.proj_out_2 = linear(c, config.patch_features, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Latents:
    """Return [b h w o] of x [b h w c], t [b] in [0, T) and, by the config, labels [b] in
    [0, classes] and text [b l d].

    The label num_embeds_ada_norm is that of no class. Sizes need not be that of training: positions
    that are added are then stretched along each axis.

    Raises:
      UserError: see `Denoiser.join`.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition)

  def _predict(self, x: Latents, t: Timesteps, given: Condition) -> Latents:
    p = self.config.patch_size
    grid = x.shape[1] // p, x.shape[2] // p
    x, rotary = self.pos_embed(x), self.config.rotary(*grid)
    text = None if given.text is None else masked(given.text, given.mask)
    interval = (given.more or {}).get(INTERVAL)
    first = condition = self.transformer_blocks[0].norm1.emb(t, given.labels, interval)
    results = []
    for n, block in enumerate(self.transformer_blocks):
      if block.norm1.emb is not None:
        condition = block.norm1.emb(t, given.labels, interval)
      # Block n takes the result of the one that is as far from the end as it is from the start.
      skip = None if block.skip_linear is None else results[self.config.num_layers - 1 - n]
      x = self.run(block, x, condition, text, rotary, skip)
      results.append(x)
    shift, scale = jnp.split(self.proj_out_1(nnx.silu(first))[:, None], 2, axis=-1)
    return unpatch(self.proj_out_2(modulate(normalize(x), shift, scale)), grid, p)
