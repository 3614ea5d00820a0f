"""The class-conditional diffusion transformer with adaLN-zero (Peebles & Xie 2023).

Names are those of diffusers' DiTTransformer2DModel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.layout import constrain
from diffusion_jax.models.attention import Attention
from diffusion_jax.models.checks import (
  MOST_EDGE,
  MOST_LAYERS,
  above_zero,
  freeze_lists,
  positive,
  require,
)
from diffusion_jax.models.embeddings import TimestepEmbedding, timestep_embedding
from diffusion_jax.models.layers import Conv, linear
from diffusion_jax.models.remat import Blocks
from diffusion_jax.models.transformer_layers import (
  FeedForward,
  Modulation,
  check_input,
  check_width,
  grid_positions,
  modulate,
  normalize,
  sincos_positions,
  unpatch,
  zeros,
)
from diffusion_jax.types import Latents, Timesteps

SINUSOIDS = 256


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """The keys of a diffusers DiTTransformer2DModel config.json; the defaults are DiT-XL/2's at 256.

  `num_embeds_ada_norm` is the number of classes; `out_channels` is 2 * in_channels where the
  network predicts variances too, None: in_channels. `shared_embedding` is ours: one embedding of
  time and label for all blocks, as in the paper. diffusers keeps a copy in every block.
  """

  num_attention_heads: int = 16
  attention_head_dim: int = 72
  in_channels: int = 4
  out_channels: int | None = 8
  num_layers: int = 28
  attention_bias: bool = True
  sample_size: int = 32
  patch_size: int = 2
  num_embeds_ada_norm: int = 1000
  norm_eps: float = 1e-5
  shared_embedding: bool = True

  def __post_init__(self):
    freeze_lists(self)
    positive(self, 'num_attention_heads', 'attention_head_dim', 'in_channels',
             'num_embeds_ada_norm')
    positive(self, 'sample_size', 'patch_size', most=MOST_EDGE)
    positive(self, 'num_layers', most=MOST_LAYERS)
    if self.out_channels is not None:
      positive(self, 'out_channels')
    above_zero(self, 'norm_eps', most=1)
    check_width(self)

  @property
  def features(self) -> int:
    """Width of a token."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def null_label(self) -> int:
    """The label of no class, which guidance and the dropout of labels use."""
    return self.num_embeds_ada_norm


class LabelEmbedding(nnx.Module):
  """Labels [b] -> [b c]; the last row is that of no class."""

  def __init__(self, config: DiTConfig, **kw):
    self.embedding_table = nnx.Embed(
      config.num_embeds_ada_norm + 1, config.features,
      embedding_init=nnx.initializers.normal(0.02), **kw,
    )

  def __call__(self, labels: jax.Array) -> jax.Array:
    return self.embedding_table(labels)


class TimeAndLabel(nnx.Module):
  """t [b], labels [b] -> the condition [b c]."""

  def __init__(self, config: DiTConfig, **kw):
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, config.features, **kw)
    self.class_embedder = LabelEmbedding(config, **kw)

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
    self.ff = FeedForward(c, **kw)
    self.epsilon = config.norm_eps

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """x [b n c], condition [b c] -> [b n c]."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(condition)
    x = x + gate * self.attn1(modulate(normalize(x), shift, scale))
    return x + ff_gate * self.ff(modulate(normalize(x, self.epsilon), ff_shift, ff_scale))


class PatchEmbed(nnx.Module):
  """Patches of [b h w i] -> tokens with their positions, [b n c]; any size of whole patches."""

  def __init__(self, config: DiTConfig, **kw):
    p = config.patch_size
    self.proj = Conv(config.in_channels, config.features, p, stride=p, padding=0, **kw)
    self.trained = config.sample_size // p

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.proj(x)
    b, h, w, c = x.shape
    rows, columns = (grid_positions(n, self.trained) for n in (h, w))
    x = (x + sincos_positions(rows, columns, c)).astype(x.dtype)
    return constrain(x.reshape(b, h * w, c), 'tokens')


class DiT(Blocks):
  """x, time and label -> an array of x's height and width; zero as long as it is untrained."""

  def __init__(
    self, config: DiTConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    c = config.features
    self.config = config
    self.pos_embed = PatchEmbed(config, **kw)
    self.transformer_blocks = nnx.List([
      DiTBlock(config, n == 0 or not config.shared_embedding, **kw)
      for n in range(config.num_layers)
    ])
    self.proj_out_1 = linear(c, 2 * c, init=zeros, **kw)
    out = config.in_channels if config.out_channels is None else config.out_channels
    self.proj_out_2 = linear(c, config.patch_size**2 * out, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, labels: jax.Array) -> Latents:
    """x [b h w c], t [b] in [0, T), labels [b] in [0, classes] -> [b h w o].

    The label `config.null_label` is that of no class. Sizes need not be that of training: positions
    are then stretched. UserError where h or w is no multiple of the patch size.
    """
    check_input(self.config, x, t)
    require(labels.shape == t.shape,
            f'The labels must have shape {list(t.shape)}, not {list(labels.shape)}.')
    return self.run_all(self._predict, x, t, labels)

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
