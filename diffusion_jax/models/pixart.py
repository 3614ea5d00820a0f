"""The text-to-image transformers PixArt-alpha and PixArt-sigma (Chen et al. 2023, 2024).

One modulation of the time serves all blocks, each of which adds a table of its own (adaLN-single),
and text is attended to. Names are those of diffusers' PixArtTransformer2DModel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models.attention import GELU, Attention, FeedForward, Masked, masked
from diffusion_jax.models.config import Edge, Epsilon, Factor, Width
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.dit import (
  SINUSOIDS,
  PatchEmbed,
  TransformerConfig,
  modulate,
  unpatch,
  zeros,
)
from diffusion_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from diffusion_jax.models.network import PLAIN
from diffusion_jax.models.norms import normalize
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Timesteps


@dataclasses.dataclass(frozen=True)
class PixArtConfig(TransformerConfig):
  """The keys of a diffusers PixArtTransformer2DModel config.json, with its defaults.

  `caption_channels` is the width of the text, which is projected to that of the tokens; None: it is
  not, and has `cross_attention_dim` channels. `interpolation_scale` divides the positions; None:
  sample_size // 64, at least 1. `use_additional_conditions`: sizes are taken, too; None: where
  sample_size is 128, as in PixArt-alpha at 1024 pixels.
  """

  sample_size: Edge = 128
  out_channels: Width | None = 8
  cross_attention_dim: Width = 1152
  attention_bias: bool = True
  norm_eps: Epsilon = 1e-6
  interpolation_scale: Factor | None = None
  use_additional_conditions: bool | None = None
  caption_channels: Width | None = None

  def check(self) -> None:
    super().check()
    self.require(
      self.caption_channels is None or self.cross_attention_dim == self.features,
      'cross_attention_dim',
      f'must with caption_channels be num_attention_heads * attention_head_dim = {self.features}',
    )
    self.require(
      not self.sized or self.features % 3 == 0, 'num_attention_heads',
      'must with use_additional_conditions make a width that is a multiple of 3',
    )

  @property
  def sized(self) -> bool:
    """Whether the network is told the size of the picture."""
    if self.use_additional_conditions is None:
      return self.sample_size == 128
    return self.use_additional_conditions

  @property
  def scale(self) -> float:
    """What positions are divided by."""
    if self.interpolation_scale is None:
      return max(self.sample_size // 64, 1)
    return self.interpolation_scale

  @property
  def conditions(self) -> Shapes:
    """What a call must be conditioned on, see `models.denoiser`."""
    text = {'text': (None, self.caption_channels or self.cross_attention_dim)}
    return text | ({'sizes': (6,)} if self.sized else {})


def table(rows: int, features: int, *, compute=PLAIN, rngs) -> nnx.Param:
  """What a block adds to the shared modulation: [rows features]."""
  init = nnx.initializers.normal(features**-0.5)
  return nnx.Param(init(rngs.params(), (rows, features), compute.param_dtype))


def shifted(scale_shift_table: nnx.Param, modulation: jax.Array) -> list[jax.Array]:
  """Table [r c] + modulation, [b r c] or [b 1 c] -> r arrays [b 1 c]."""
  both = modulation + scale_shift_table[...].astype(modulation.dtype)
  return jnp.split(both, both.shape[1], axis=1)


class PixArtBlock(nnx.Module):
  """Self-attention, attention to the text, feed-forward (Chen et al. 2023, figure 4)."""

  def __init__(self, config: PixArtConfig, **kw):
    c, heads, bias = config.features, config.num_attention_heads, config.attention_bias
    self.scale_shift_table = table(6, c, **kw)
    self.attn1 = Attention(c, heads=heads, qkv_bias=bias, **kw)
    self.attn2 = Attention(
      c, heads=heads, context_features=config.cross_attention_dim, qkv_bias=bias, **kw
    )
    self.ff = FeedForward(c, GELU, **kw)
    self.epsilon = config.norm_eps

  def __call__(
    self, x: jax.Array, modulation: jax.Array, text: jax.Array | Masked
  ) -> jax.Array:
    """x [b n c], modulation [b 6 c], text [b l d] -> [b n c]."""
    parts = shifted(self.scale_shift_table, modulation)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
    x = x + gate * self.attn1(modulate(normalize(x, self.epsilon), shift, scale))
    x = x + self.attn2(x, text)
    return x + ff_gate * self.ff(modulate(normalize(x, self.epsilon), ff_shift, ff_scale))


class TimeAndSize(nnx.Module):
  """t [b], and sizes [b 6] where they are used -> [b c]."""

  def __init__(self, config: PixArtConfig, **kw):
    c = config.features
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, c, **kw)
    self.sized = config.sized
    if self.sized:
      self.resolution_embedder = TimestepEmbedding(SINUSOIDS, c // 3, **kw)
      self.aspect_ratio_embedder = TimestepEmbedding(SINUSOIDS, c // 3, **kw)

  def __call__(self, t: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Of the sizes the last two are read: height and width of the picture, and their ratio."""
    time = self.timestep_embedder(timestep_embedding(t, SINUSOIDS))
    if not self.sized:
      return time
    height, width = sizes[:, 4], sizes[:, 5]
    embedded = lambda layer, value: layer(timestep_embedding(value, SINUSOIDS))
    return time + jnp.concatenate([
      embedded(self.resolution_embedder, height), embedded(self.resolution_embedder, width),
      embedded(self.aspect_ratio_embedder, height / width),
    ], axis=-1)


class SharedModulation(nnx.Module):
  """t and sizes -> (the modulation of all blocks [b 6 c], the embedding [b c] it is made from)."""

  def __init__(self, config: PixArtConfig, **kw):
    self.emb = TimeAndSize(config, **kw)
    self.linear = linear(config.features, 6 * config.features, **kw)

  def __call__(self, t: jax.Array, sizes: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    embedded = self.emb(t, sizes)
    modulation = constrain(self.linear(nnx.silu(embedded)), 'vector')
    return modulation.reshape(len(t), 6, -1), embedded


class CaptionProjection(nnx.Module):
  """Two dense layers with a GELU in its tanh approximation: [b l d] -> [b l c]."""

  def __init__(self, config: PixArtConfig, **kw):
    self.linear_1 = linear(config.caption_channels, config.features, **kw)
    self.linear_2 = linear(config.features, config.features, **kw)

  def __call__(self, text: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(constrain(self.linear_1(text), 'hidden'), approximate=True)
    return constrain(self.linear_2(hidden), 'tokens')


class ScaledPatchEmbed(PatchEmbed):
  """Patches with positions that are divided by the config's scale."""

  def __init__(self, config: PixArtConfig, **kw):
    super().__init__(config, **kw)
    self.scale = config.scale

  def places(self, cells: int):
    return super().places(cells) / self.scale


class PixArt(Denoiser):
  """x, time and text -> an array of x's height and width; zero as long as it is untrained."""

  def __init__(self, config: PixArtConfig, **kw):
    super().__init__(**kw)
    c = config.features
    self.config = config
    self.pos_embed = ScaledPatchEmbed(config, **kw)
    self.adaln_single = SharedModulation(config, **kw)
    projected = config.caption_channels is not None
    self.caption_projection = CaptionProjection(config, **kw) if projected else None
    self.transformer_blocks = nnx.List([
      PixArtBlock(config, **kw) for _ in range(config.num_layers)
    ])
    self.scale_shift_table = table(2, c, **kw)
    self.proj_out = linear(c, config.patch_features, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Latents:
    """Return [b h w o] of x [b h w c], t [b] in [0, 1000], text [b l d] and, by the config, sizes
    [b 6], of which the target's height and width are read.

    Raises:
      UserError: see `Denoiser.join`.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition)

  def _predict(self, x: Latents, t: Timesteps, given: Condition) -> Latents:
    p = self.config.patch_size
    grid = x.shape[1] // p, x.shape[2] // p
    x = self.pos_embed(x)
    modulation, embedded = self.adaln_single(t, given.sizes)
    project = self.caption_projection or (lambda text: text)
    text = masked(project(given.text), given.mask)
    for block in self.transformer_blocks:
      x = self.run(block, x, modulation, text)
    shift, scale = shifted(self.scale_shift_table, embedded[:, None])
    return unpatch(self.proj_out(modulate(normalize(x), shift, scale)), grid, p)
