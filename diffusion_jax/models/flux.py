"""The transformer of Flux.1: joint blocks as in Stable Diffusion 3, then blocks of one stream.

Names are those of diffusers' FluxTransformer2DModel. Patches of 2 x 2 latents are taken apart and
put together here, so that x is an image of latents as everywhere.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.limits import Length, Range
from diffusion_jax.models.attention import MultiHead
from diffusion_jax.models.config import Edge, Layers, Width
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.dit import SINUSOIDS, Modulation, TransformerConfig, modulate, zeros
from diffusion_jax.models.layers import TimestepEmbedding, linear, timestep_embedding
from diffusion_jax.models.mmdit import JointTransformerBlock
from diffusion_jax.models.norms import RMSNorm, normalize
from diffusion_jax.models.rotary import Rotation, grid, rotate, rotation
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Timesteps

THOUSAND = 1000.0
"""The scale of guidance in its embedding, as of the time."""


@dataclasses.dataclass(frozen=True)
class FluxConfig(TransformerConfig):
  """Flux.1 dev with `guidance_embeds`, schnell without.

  `num_layers` counts the joint blocks. `axes_dims_rope` divides a head among the rotations by
  image (always the first), row and column.
  """

  sample_size: Edge = 128
  patch_size: Annotated[int, Range(2, 2)] = 2
  in_channels: Width = 16
  num_layers: Layers = 19
  num_single_layers: Layers = 38
  attention_head_dim: Width = 128
  num_attention_heads: Width = 24
  joint_attention_dim: Width = 4096
  pooled_projection_dim: Width = 768
  guidance_embeds: bool = False
  axes_dims_rope: Annotated[tuple[Annotated[int, Range(2, 2**12)], ...], Length(3, 3)] = (
    16, 56, 56
  )

  dual_attention_layers = ()
  qk_norm = 'rms_norm'

  def check(self) -> None:
    fits = sum(self.axes_dims_rope) == self.attention_head_dim
    even = all(width % 2 == 0 for width in self.axes_dims_rope)
    self.require(
      fits and even, 'axes_dims_rope',
      f'must hold even numbers whose sum is attention_head_dim={self.attention_head_dim}',
    )

  @property
  def conditions(self) -> Shapes:
    """What a call must be conditioned on, see `models.denoiser`."""
    text = {'text': (None, self.joint_attention_dim), 'pooled': (self.pooled_projection_dim,)}
    return text | ({'guidance': ()} if self.guidance_embeds else {})


class SingleAttention(MultiHead):
  """Attention of all tokens to all, without a layer after it: [b n c] -> [b n c]."""

  def __init__(self, config: FluxConfig, **kw):
    super().__init__(config.num_attention_heads, **kw)
    c = config.features
    self.to_q, self.to_k, self.to_v = (linear(c, c, **kw) for _ in range(3))
    self.norm_q, self.norm_k = (RMSNorm(config.attention_head_dim, 1e-6, **kw) for _ in range(2))

  def __call__(self, x: jax.Array, rotary: Rotation, mask: jax.Array | None) -> jax.Array:
    q = rotate(self.norm_q(self.by_head(self.to_q(x))), rotary)
    k = rotate(self.norm_k(self.by_head(self.to_k(x))), rotary)
    return self.attend(q, k, self.by_head(self.to_v(x)), mask)


class SingleTransformerBlock(nnx.Module):
  """Attention and feed-forward side by side, as in ViT-22B (Dehghani et al. 2023, eq. 1)."""

  def __init__(self, config: FluxConfig, **kw):
    c = config.features
    self.norm = Modulation(c, 3, **kw)
    self.proj_mlp = linear(c, 4 * c, **kw)
    self.proj_out = linear(5 * c, c, **kw)
    self.attn = SingleAttention(config, **kw)

  def __call__(
    self, x: jax.Array, condition: jax.Array, rotary: Rotation, mask: jax.Array | None
  ) -> jax.Array:
    """x [b n c], text before image; condition [b c] -> [b n c]."""
    shift, scale, gate = self.norm(condition)
    normed = modulate(normalize(x), shift, scale)
    hidden = jax.nn.gelu(constrain(self.proj_mlp(normed), 'hidden'), approximate=True)
    y = jnp.concatenate([self.attn(normed, rotary, mask), hidden], axis=-1)
    return x + gate * constrain(self.proj_out(y), 'tokens')


class TimeGuidanceText(nnx.Module):
  """t [b], guidance [b] if it is used, pooled text [b d] -> the condition [b c]."""

  def __init__(self, config: FluxConfig, **kw):
    c = config.features
    self.timestep_embedder = TimestepEmbedding(SINUSOIDS, c, **kw)
    guided = config.guidance_embeds
    self.guidance_embedder = TimestepEmbedding(SINUSOIDS, c, **kw) if guided else None
    self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, c, **kw)

  def __call__(
    self, t: jax.Array, guidance: jax.Array | None, pooled: jax.Array
  ) -> jax.Array:
    out = self.timestep_embedder(timestep_embedding(t, SINUSOIDS)) + self.text_embedder(pooled)
    if self.guidance_embedder is None:
      return out
    return out + self.guidance_embedder(timestep_embedding(guidance * THOUSAND, SINUSOIDS))


def packed(x: jax.Array) -> jax.Array:
  """Latents [b h w c] -> tokens of 2 x 2 of them, channel by channel: [b h/2*w/2 4*c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(b, h * w // 4, 4 * c)


def unpacked(x: jax.Array, h: int, w: int) -> jax.Array:
  """Invert `packed`, for latents of h x w."""
  x = x.reshape(x.shape[0], h // 2, w // 2, -1, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(x.shape[0], h, w, -1)


class Flux(Denoiser):
  """x, time and text -> the velocity, of x's height and width; zero as long as it is untrained."""

  def __init__(self, config: FluxConfig, **kw):
    super().__init__(**kw)
    c = config.features
    self.config = config
    self.time_text_embed = TimeGuidanceText(config, **kw)
    self.context_embedder = linear(config.joint_attention_dim, c, **kw)
    self.x_embedder = linear(4 * config.in_channels, c, **kw)
    self.transformer_blocks = nnx.List([
      JointTransformerBlock(config, -1, **kw) for _ in range(config.num_layers)
    ])
    self.single_transformer_blocks = nnx.List([
      SingleTransformerBlock(config, **kw) for _ in range(config.num_single_layers)
    ])
    self.norm_out = Modulation(c, 2, **kw)
    self.proj_out = linear(c, config.patch_features, init=zeros, **kw)

  def __call__(self, x: Latents, t: Timesteps, condition: Condition) -> Latents:
    """Return [b h w o] of x [b h w c], t [b] in [0, 1000], text [b l d], pooled text [b e] and,
    by the config, guidance [b], such as 3.5.

    Raises:
      UserError: see `Denoiser.join`.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition)

  def _predict(self, x: Latents, t: Timesteps, given: Condition) -> Latents:
    h, w = x.shape[1:3]
    text = self.context_embedder(given.text)
    condition = self.time_text_embed(t, given.guidance, given.pooled)
    places = np.pad(grid(np.arange(h // 2), np.arange(w // 2)), ((0, 0), (1, 0)))
    everywhere = np.pad(places, ((text.shape[1], 0), (0, 0)))  # Text lies at the origin.
    rotary, all_rotary = (rotation(p, self.config.axes_dims_rope) for p in (places, everywhere))
    x = constrain(self.x_embedder(packed(x)), 'tokens')
    for block in self.transformer_blocks:
      x, text = self.run(block, x, text, condition, given.mask, rotary)
    both = jnp.concatenate([text, x], axis=1)
    mask = given.mask
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=1)
    for block in self.single_transformer_blocks:
      both = self.run(block, both, condition, all_rotary, mask)
    scale, shift = self.norm_out(condition)
    x = modulate(normalize(both[:, text.shape[1] :]), shift, scale)
    return unpacked(self.proj_out(x), h, w)
