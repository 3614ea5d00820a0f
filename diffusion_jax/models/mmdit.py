"""The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, sec. 4).

Text and image tokens have separate weights and joint attention. Names are those of diffusers'
SD3Transformer2DModel.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.limits import Range
from diffusion_jax.models.attention import GELU, FeedForward, MultiHead
from diffusion_jax.models.config import Edge, Layers, Width
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.dit import (
  PATCHES,
  SINUSOIDS,
  Modulation,
  PatchEmbed,
  Positions,
  TransformerConfig,
  grid_positions,
  modulate,
  sincos_positions,
  unpatch,
  zeros,
)
from diffusion_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from diffusion_jax.models.network import PLAIN
from diffusion_jax.models.norms import RMSNorm, normalize
from diffusion_jax.models.rotary import Rotation, rotate
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Timesteps


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(TransformerConfig):
  """The keys of a diffusers SD3Transformer2DModel config.json, with its defaults.

  `pos_embed_max_size` bounds the patches along a side where positions are 'sincos'; `qk_norm` is
  None or 'rms_norm' (Stable Diffusion 3.5); `dual_attention_layers` lists the blocks in which the
  image tokens attend to themselves once more. Ours are other `positions`, of the image alone, and
  pooled_projection_dim None, for a network without pooled text.
  """

  sample_size: Edge = 128
  in_channels: Width = 16
  out_channels: Width | None = 16
  num_layers: Layers = 18
  attention_head_dim: Width = 64
  num_attention_heads: Width = 18
  joint_attention_dim: Width = 4096
  caption_projection_dim: Width = 1152
  pooled_projection_dim: Width | None = 2048
  # The table of all positions is made when the network is.
  pos_embed_max_size: Annotated[int, Range(1, 1024)] = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: Literal['rms_norm'] | None = None
  positions: Positions = 'sincos'

  def check(self) -> None:
    super().check()
    self.require(
      self.caption_projection_dim == self.features, 'caption_projection_dim',
      f'must be num_attention_heads * attention_head_dim = {self.features}',
    )
    self.require(
      set(self.dual_attention_layers) <= set(range(self.num_layers)), 'dual_attention_layers',
      f'must hold some of the blocks 0 to {self.num_layers - 1}',
    )

  @property
  def most(self) -> int | None:
    """Height and width of the latents are at most this: there are positions for no more."""
    return self.pos_embed_max_size * self.patch_size if self.positions == 'sincos' else None

  @property
  def conditions(self) -> Shapes:
    """What a call must be conditioned on, see `models.denoiser`."""
    pooled = self.pooled_projection_dim
    text = {'text': (None, self.joint_attention_dim)}
    return text if pooled is None else text | {'pooled': (pooled,)}


class JointAttention(MultiHead):
  """Attention of image tokens, and of text tokens if given, to both (Esser et al. 2024, fig. 2).

  joint False: without text. last: the text's result is not needed; its queries' published weights
  are kept unused.
  """

  def __init__(self, config: MMDiTConfig, *, joint: bool, last: bool = False, **kw):
    super().__init__(config.num_attention_heads, **kw)
    c = config.features
    normed = config.qk_norm is not None
    norm = lambda: RMSNorm(config.attention_head_dim, 1e-6, **kw) if normed else None
    self.to_q, self.to_k, self.to_v = (linear(c, c, **kw) for _ in range(3))
    self.to_out = nnx.List([linear(c, c, **kw)])
    self.norm_q, self.norm_k = norm(), norm()
    if joint:
      self.add_q_proj, self.add_k_proj, self.add_v_proj = (linear(c, c, **kw) for _ in range(3))
      self.to_add_out = None if last else linear(c, c, **kw)
      self.norm_added_q, self.norm_added_k = norm(), norm()

  def __call__(
    self, x: jax.Array, text: jax.Array | None = None, mask: jax.Array | None = None,
    rotary: Rotation | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """x [b n c], text [b l c] -> the same, or None for the text of the last block.

    `mask` [b l] is 0 at padding of the text. `rotary` turns the image's queries and keys.
    """
    by_head = self.by_head
    normed = lambda y, norm: y if norm is None else norm(y)
    q, k, v = by_head(self.to_q(x)), by_head(self.to_k(x)), by_head(self.to_v(x))
    q, k = normed(q, self.norm_q), normed(k, self.norm_k)
    if rotary is not None:
      q, k = rotate(q, rotary), rotate(k, rotary)
    if text is not None:
      more = normed(by_head(self.add_k_proj(text)), self.norm_added_k)
      k = jnp.concatenate([k, more], axis=1)
      v = jnp.concatenate([v, by_head(self.add_v_proj(text))], axis=1)
    wanted = text is not None and self.to_add_out is not None
    if wanted:
      more = normed(by_head(self.add_q_proj(text)), self.norm_added_q)
      q = jnp.concatenate([q, more], axis=1)
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (x.shape[1], 0)), constant_values=1)
    y, words = jnp.split(self.attend(q, k, v, mask), [x.shape[1]], axis=1)
    words = constrain(self.to_add_out(words), 'tokens') if wanted else None
    return constrain(self.to_out[0](y), 'tokens'), words


class JointTransformerBlock(nnx.Module):
  """Joint attention, then a feed-forward layer for each kind of token, all modulated and gated."""

  def __init__(self, config: MMDiTConfig, n: int, **kw):
    c, last = config.features, n == config.num_layers - 1
    dual = n in config.dual_attention_layers
    self.norm1 = Modulation(c, 9 if dual else 6, **kw)
    self.norm1_context = Modulation(c, 2 if last else 6, **kw)
    self.attn = JointAttention(config, joint=True, last=last, **kw)
    self.attn2 = JointAttention(config, joint=False, **kw) if dual else None
    self.ff = FeedForward(c, GELU, **kw)
    self.ff_context = None if last else FeedForward(c, GELU, **kw)

  def __call__(
    self, x: jax.Array, text: jax.Array, condition: jax.Array, mask: jax.Array | None = None,
    rotary: Rotation | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """x [b n c], text [b l c], condition [b c] -> x and text, or None after the last block."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = self.norm1(condition)
    words = self.norm1_context(condition)
    # The last block's modulation of the text has the scale first.
    words_shift, words_scale = words[1::-1] if self.ff_context is None else words[:2]
    normed = normalize(x)
    y, more = self.attn(
      modulate(normed, shift, scale), modulate(normalize(text), words_shift, words_scale), mask,
      rotary,
    )
    x = x + gate * y
    if self.attn2 is not None:
      shift, scale, gate = dual
      x = x + gate * self.attn2(modulate(normed, shift, scale), rotary=rotary)[0]
    x = x + ff_gate * self.ff(modulate(normalize(x), ff_shift, ff_scale))
    if self.ff_context is None:
      return x, None
    gate, ff_shift, ff_scale, ff_gate = words[2:]
    text = text + gate * more
    return x, text + ff_gate * self.ff_context(modulate(normalize(text), ff_shift, ff_scale))


class CroppedPatchEmbed(PatchEmbed):
  """Patches of [b h w i] -> tokens with their positions, [b n c].

  Positions are the middle of a fixed table of max^2 rows, which published files hold, and which may
  change between stages of training at larger sizes.
  """

  def __init__(self, config: MMDiTConfig, **kw):
    super().__init__(config, **kw)
    side = config.pos_embed_max_size
    positions = grid_positions(side, self.trained)
    table = sincos_positions(positions, positions, config.features).reshape(1, side**2, -1)
    self.pos_embed = nnx.Param(table.astype(kw.get('compute', PLAIN).param_dtype))
    self.side = side

  def positions(self, h: int, w: int, features: int) -> jax.Array:
    top, left = (self.side - h) // 2, (self.side - w) // 2
    table = lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, features)
    return table[top : top + h, left : left + w]


class TimeAndText(nnx.Module):
  """t [b], pooled text [b d] where there is one -> the condition [b c]."""

  def __init__(self, config: MMDiTConfig, **kw):
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, config.features, **kw)
    width, c = config.pooled_projection_dim, config.features
    self.text_embedder = None if width is None else TimestepEmbedding(width, c, **kw)

  def __call__(self, t: jax.Array, pooled: jax.Array | None) -> jax.Array:
    time = self.timestep_embedder(timestep_embedding(t, SINUSOIDS))
    return time if self.text_embedder is None else time + self.text_embedder(pooled)


class MMDiT(Denoiser):
  """x, time and text -> an array of x's height and width; zero as long as it is untrained."""

  def __init__(self, config: MMDiTConfig, **kw):
    super().__init__(**kw)
    c = config.features
    self.config = config
    self.pos_embed = (PATCHES | {'sincos': CroppedPatchEmbed})[config.positions](config, **kw)
    self.time_text_embed = TimeAndText(config, **kw)
    self.context_embedder = linear(config.joint_attention_dim, c, **kw)
    self.transformer_blocks = nnx.List([
      JointTransformerBlock(config, n, **kw) for n in range(config.num_layers)
    ])
    self.norm_out = Modulation(c, 2, **kw)
    self.proj_out = linear(c, config.patch_features, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Latents:
    """Return [b h w o] of x [b h w c], t [b] in [0, 1000], text [b l d] and, by the config, pooled
    text [b e].

    UserError: see `Denoiser.join`.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition)

  def _predict(self, x: Latents, t: Timesteps, given: Condition) -> Latents:
    p = self.config.patch_size
    grid = x.shape[1] // p, x.shape[2] // p
    x, text = self.pos_embed(x), self.context_embedder(given.text)
    rotary = self.config.rotary(*grid)
    condition = self.time_text_embed(t, given.pooled)
    for block in self.transformer_blocks:
      x, text = self.run(block, x, text, condition, given.mask, rotary)
    scale, shift = self.norm_out(condition)
    return unpatch(self.proj_out(modulate(normalize(x), shift, scale)), grid, p)
