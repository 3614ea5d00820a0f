"""The text-conditional U-Net of latent diffusion (Rombach et al. 2022; Ronneberger et al. 2015).

Names and computation follow diffusers' UNet2DConditionModel, config fields its config.json: Stable
Diffusion 1, 2, XL and models made from them.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.limits import Length, Range
from diffusion_jax.models.attention import (
  Masked,
  SpatialAttention,
  Transformer2DModel,
  masked,
)
from diffusion_jax.models.config import (
  Edge,
  Epsilon,
  Layers,
  LayersPerLevel,
  LevelsConfig,
  PerLevel,
  Width,
  Widths,
)
from diffusion_jax.models.denoiser import Denoiser, Shapes
from diffusion_jax.models.layers import (
  Conv,
  Downsample2D,
  ResnetBlock2D,
  TimestepEmbedding,
  Upsample2D,
  embed,
  timestep_embedding,
)
from diffusion_jax.models.network import Blocks
from diffusion_jax.models.norms import GroupNorm
from diffusion_jax.parallel.layout import constrain
from diffusion_jax.types import Condition, Latents, Residuals, Timesteps

PER_LEVEL = (
  'down_block_types', 'up_block_types', 'attention_head_dim', 'transformer_layers_per_block',
  'only_cross_attention', 'layers_per_block',
)
"""Fields with one value for all levels, or one for each."""

NEEDED = {
  ('class_embed_type', 'projection'): ('projection_class_embeddings_input_dim',),
  ('addition_embed_type', 'text_time'): (
    'projection_class_embeddings_input_dim', 'addition_time_embed_dim'
  ),
}
"""(field, value) -> fields that must be set with it."""

THOUSAND = 1000.0
"""Factor on the guidance in its sinusoids."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig(LevelsConfig):
  """Shape of the half that a U-Net and its ControlNets share, from the input to the mid block.

  The defaults are Stable Diffusion 1's. Where a field takes one value or one per level, levels
  count from the highest resolution down.

  mid_block_type: with attention, without (UNetMidBlock2D), or None for no mid block at all.
  layers_per_block: residual blocks on the way down; one or one per level.
  transformer_layers_per_block: transformer blocks in each attention; one or one per level.
  attention_head_dim: for historical reasons the NUMBER of heads; one or one per level.
  only_cross_attention: one or one per level: where it holds, the first attention of each
    transformer block of the level, going down and up, is to the text too. Never in the mid block.
  upcast_attention: for diffusers, which reads it; attention logits here are always float32.
  resnet_time_scale_shift: the time embedding is added ('default') or scales and shifts the norm.
  class_embed_type: how the call's `labels` [b] become an embedding that is added to that of the
    time. None with num_class_embeds: a table, for whole numbers below it. 'timestep': as the time
    itself. 'projection': an MLP over `labels` [b projection_class_embeddings_input_dim].
  addition_embed_type: 'text_time' is Stable Diffusion XL's: `pooled` and the sinusoids, each
    addition_time_embed_dim wide, of `sizes`, together projection_class_embeddings_input_dim wide,
    through an MLP, added likewise.
  """

  in_channels: Width = 4
  down_block_types: tuple[Literal['CrossAttnDownBlock2D', 'DownBlock2D'], ...] = (
    *['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'
  )
  mid_block_type: Literal['UNetMidBlock2DCrossAttn', 'UNetMidBlock2D'] | None = (
    'UNetMidBlock2DCrossAttn'
  )
  block_out_channels: Widths = (320, 640, 1280, 1280)
  layers_per_block: Layers | LayersPerLevel = 2
  norm_num_groups: Width = 32
  norm_eps: Epsilon = 1e-5
  cross_attention_dim: Width = 768
  transformer_layers_per_block: Layers | LayersPerLevel = 1
  attention_head_dim: Width | Widths = 8
  only_cross_attention: bool | Annotated[tuple[bool, ...], PerLevel] = False
  use_linear_projection: bool = False
  upcast_attention: bool = False
  resnet_time_scale_shift: Literal['default', 'scale_shift'] = 'default'
  flip_sin_to_cos: bool = True
  freq_shift: Annotated[int, Range(0, 1)] = 0
  class_embed_type: Literal['timestep', 'projection'] | None = None
  num_class_embeds: Width | None = None
  projection_class_embeddings_input_dim: Width | None = None
  addition_embed_type: Literal['text_time'] | None = None
  addition_time_embed_dim: Width | None = None

  def check(self) -> None:
    self.check_groups()
    self.check_entries(len(self.block_out_channels), PER_LEVEL)
    # Down, up and in the middle: residual blocks, with transformer blocks in each attention.
    each = zip(self.layers, self.depths, strict=True)
    self.check_blocks(2 * sum(count * (1 + n) for count, n in each) + self.depths[-1])
    for kind, needed in NEEDED.items():
      for field in needed:
        self.require(
          getattr(self, kind[0]) != kind[1] or getattr(self, field) is not None, field,
          f'must be a number, as {kind[0]} is {kind[1]!r}',
        )
    for heads, channels in zip(self.heads, self.block_out_channels, strict=True):
      self.require(
        channels % heads == 0, 'attention_head_dim',
        f'must divide the channels, as it is the NUMBER of heads, and {heads} heads do not divide '
        f'{channels} channels',
      )

  downsample_padding = 1

  @property
  def mid_resnets(self) -> int:
    """Residual blocks of the mid block."""
    return 2 if self.mid_block_type == 'UNetMidBlock2DCrossAttn' else 1

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads at each level, from the highest resolution down."""
    return self._per_level(self.attention_head_dim)

  @property
  def layers(self) -> tuple[int, ...]:
    """Residual blocks at each level on the way down; on the way up there is one more."""
    return self._per_level(self.layers_per_block)

  @property
  def depths(self) -> tuple[int, ...]:
    """Transformer blocks per attention at each level."""
    return self._per_level(self.transformer_layers_per_block)

  @property
  def only_text(self) -> tuple[bool, ...]:
    """True where both attentions are to the text, at each level."""
    return self._per_level(self.only_cross_attention)

  def _per_level(self, value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

  @property
  def conditions(self) -> Shapes:
    """Required conditions, see `models.denoiser`."""
    shapes = {'text': (None, self.cross_attention_dim)}
    if self.labelled:
      projected = self.class_embed_type == 'projection'
      shapes['labels'] = (self.projection_class_embeddings_input_dim,) if projected else ()
    if self.addition_embed_type == 'text_time':
      shapes |= {'pooled': (None,), 'sizes': (None,)}
    return shapes | ({'guidance': ()} if self.imitates_guidance else {})

  @property
  def imitates_guidance(self) -> bool:
    """True if the guidance it is given takes the place of classifier-free guidance."""
    return self.guidance_features is not None

  @property
  def guidance_features(self) -> int | None:
    """Width of the sinusoids of that guidance."""
    return None


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
  """Shape of the U-Net; the defaults are Stable Diffusion 1's, published ones in formats/unet.py.

  sample_size: side of the training latents, or height and width; no restriction.
  time_cond_proj_dim: width of the sinusoids of the guidance that a consistency model imitates (Luo
    et al. 2023, sec. 4.2), which are projected and added to those of the time; None: it has none.
  """

  sample_size: Edge | Annotated[tuple[Edge, ...], Length(2, 2)] | None = 64
  out_channels: Width = 4
  up_block_types: tuple[Literal['UpBlock2D', 'CrossAttnUpBlock2D'], ...] = (
    'UpBlock2D', *['CrossAttnUpBlock2D'] * 3
  )
  time_cond_proj_dim: Annotated[int, Range(4, 2**20)] | None = None

  @property
  def guidance_features(self) -> int | None:
    return self.time_cond_proj_dim

  def trained_at(self, height: int, width: int) -> 'UNetConfig':
    """Return the config of the same network, trained on latents of that size."""
    return dataclasses.replace(self, sample_size=height if height == width else (height, width))


def _resnet(config: EncoderConfig, i: int, o: int, **kw) -> ResnetBlock2D:
  return ResnetBlock2D(
    i, o, groups=config.norm_num_groups, epsilon=config.norm_eps,
    time_features=config.time_features,
    scale_shift=config.resnet_time_scale_shift == 'scale_shift', **kw,
  )


def _transformer(
  config: EncoderConfig, level: int, *, only_text: bool = False, **kw
) -> Transformer2DModel:
  return Transformer2DModel(
    config.block_out_channels[level], heads=config.heads[level], depth=config.depths[level],
    context_features=config.cross_attention_dim, groups=config.norm_num_groups,
    linear_projection=config.use_linear_projection, only_text=only_text, **kw,
  )


def _attention(config: EncoderConfig, level: int, block_type: str, **kw) -> nnx.Module:
  """Return a call (x, text) -> x: attention to the text too, or to x alone, by the block's type."""
  if not block_type.startswith('Attn'):
    mid = block_type.startswith('UNetMid')
    return _transformer(config, level, only_text=config.only_text[level] and not mid, **kw)
  return SelfAttention2D(
    config.block_out_channels[level], heads=config.heads[level], groups=config.norm_num_groups,
    epsilon=config.norm_eps, **kw,
  )


class SelfAttention2D(SpatialAttention):
  """Residual self-attention over all positions of x [b h w c], whatever the text."""

  def __call__(self, x: jax.Array, text: jax.Array | Masked | None = None) -> jax.Array:
    return super().__call__(x)


class Level(Blocks):
  """Residual blocks from these numbers of channels, each with attention after it or without."""

  def __init__(self, config: EncoderConfig, level: int, inputs: list[int], block_type: str, **kw):
    super().__init__(**kw)
    o, attentions = config.block_out_channels[level], inputs if 'Attn' in block_type else ()
    self.resnets = nnx.List([_resnet(config, i, o, **kw) for i in inputs])
    self.attentions = nnx.List([_attention(config, level, block_type, **kw) for _ in attentions])

  def layer(self, n: int, x: jax.Array, text: jax.Array | Masked, *args: jax.Array) -> jax.Array:
    """Return x after residual block n, which is given `args`, and its attention."""
    x = self.run(self.resnets[n], x, *args)
    return self.attentions[n](x, text) if self.attentions else x


class DownBlock(Level):
  """A level, then halving, except at the last.

  x [b h w i] -> [b h/2 w/2 o] and every intermediate result, for the skip connections.
  """

  def __init__(self, config: EncoderConfig, level: int, **kw):
    widths, layers = config.block_out_channels, config.layers[level]
    inputs = [widths[max(level - 1, 0)]] + [widths[level]] * (layers - 1)
    super().__init__(config, level, inputs, config.down_block_types[level], **kw)
    last = level == len(widths) - 1
    halve = lambda: Downsample2D(widths[level], asymmetric=not config.downsample_padding, **kw)
    self.downsamplers = nnx.List([] if last else [halve()])

  def __call__(
    self, x: jax.Array, time: jax.Array, text: jax.Array | Masked
  ) -> tuple[jax.Array, list[jax.Array]]:
    skips = []
    for n in range(len(self.resnets)):
      x = self.layer(n, x, text, time)
      skips.append(x)
    for downsample in self.downsamplers:
      x = self.run(downsample, x)
      skips.append(x)
    return x, skips


class MidBlock(Blocks):
  """Residual block, attention, residual block at the lowest resolution: [b h w c] -> [b h w c].

  'UNetMidBlock2D' is the first residual block alone.
  """

  def __init__(self, config: EncoderConfig, **kw):
    super().__init__(**kw)
    c, kind = config.block_out_channels[-1], config.mid_block_type
    level, attend = len(config.block_out_channels) - 1, 'Attn' in kind
    self.attentions = nnx.List([_attention(config, level, kind, **kw) for _ in range(int(attend))])
    self.resnets = nnx.List([_resnet(config, c, c, **kw) for _ in range(config.mid_resnets)])

  def __call__(self, x: jax.Array, time: jax.Array, text: jax.Array | Masked) -> jax.Array:
    x = self.run(self.resnets[0], x, time)
    for attention in self.attentions:
      x = attention(x, text)
    for resnet in self.resnets[1:]:
      x = self.run(resnet, x, time)
    return x


class UpBlock(Level):
  """Like DownBlock with one more residual block, each fed its mirrored skip; then doubling.

  `step` counts from the lowest resolution; x [b h w i], skips (taken from the end) -> [b 2h 2w o].
  """

  def __init__(self, config: UNetConfig, step: int, **kw):
    widths = config.block_out_channels
    level = len(widths) - 1 - step
    layers = config.layers[level]
    above, o, below = (widths[0], *widths, widths[-1])[level : level + 3]
    # The last skip of a level is the result of the level above it, after halving.
    skips = [o] * layers + [above]
    inputs = [i + skip for i, skip in zip([below] + [o] * layers, skips, strict=True)]
    super().__init__(config, level, inputs, config.up_block_types[step], **kw)
    self.upsamplers = nnx.List([] if level == 0 else [Upsample2D(o, **kw)])

  def __call__(
    self, x: jax.Array, skips: list[jax.Array], time: jax.Array, text: jax.Array | Masked
  ) -> jax.Array:
    for n in range(len(self.resnets)):
      x = self.layer(n, x, text, time, skips.pop())
    for upsample in self.upsamplers:
      x = self.run(upsample, x)
    return x


class Encoder(Denoiser):
  """Input convolution, embeddings of time and other conditions, down blocks and mid block.

  Subclasses add their submodules to these, as in the published files.
  """

  def __init__(self, config: EncoderConfig, **kw):
    super().__init__(**kw)
    width, features = config.block_out_channels[0], config.time_features
    self.config = config
    self.conv_in = Conv(config.in_channels, width, **kw)
    self.time_embedding = TimestepEmbedding(
      width, features, more_features=config.guidance_features, **kw
    )
    projected = config.projection_class_embeddings_input_dim
    if config.class_embed_type is not None:
      inputs = width if config.class_embed_type == 'timestep' else projected
      self.class_embedding = TimestepEmbedding(inputs, features, **kw)
    elif config.num_class_embeds is not None:
      init = nnx.initializers.normal(1.0)  # PyTorch's default, as for every layer here.
      self.class_embedding = embed(config.num_class_embeds, features, init, **kw)
    if config.addition_embed_type == 'text_time':
      self.add_embedding = TimestepEmbedding(projected, features, **kw)
    levels = range(len(config.block_out_channels))
    self.down_blocks = nnx.List([DownBlock(config, level, **kw) for level in levels])
    self.mid_block = None if config.mid_block_type is None else MidBlock(config, **kw)

  def embed(self, t: jax.Array, condition: Condition) -> jax.Array:
    """Return the sum of the embeddings of the time and of all other conditions: [b e]."""
    config, width = self.config, self.config.block_out_channels[0]
    time = self.time_embedding(self._sinusoids(t, width), self._guidance(condition.guidance))
    if (labels := condition.labels) is not None:
      timed = config.class_embed_type == 'timestep'
      time = time + self.class_embedding(self._sinusoids(labels, width) if timed else labels)
    if (sizes := condition.sizes) is not None:
      each = self._sinusoids(sizes.reshape(-1), config.addition_time_embed_dim)
      each, pooled = each.reshape(len(sizes), -1), condition.pooled
      time = time + self.add_embedding(jnp.concatenate([pooled.astype(each.dtype), each], -1))
    return time

  def descend(
    self, x: jax.Array, time: jax.Array, text: jax.Array | Masked
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Features [b h w c] -> the mid block's result and every skip on the way, x first."""
    skips = [x]
    for block in self.down_blocks:
      x, more = block(x, time, text)
      skips += more
    return x if self.mid_block is None else self.mid_block(x, time, text), skips

  def _sinusoids(self, t: jax.Array, features: int) -> jax.Array:
    return timestep_embedding(
      t, features, flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift
    )

  def _guidance(self, guidance: jax.Array | None) -> jax.Array | None:
    """The sinusoids [b guidance_features] of w = guidance - 1, which is 0 for none."""
    features = self.config.guidance_features
    return None if features is None else timestep_embedding(
      THOUSAND * (guidance - 1), features, flip_sin_to_cos=False, freq_shift=1
    )

  def check_conditions(self, b: int, condition: Condition) -> None:
    super().check_conditions(b, condition)
    config = self.config
    if (labels := condition.labels) is not None:
      require(
        config.class_embed_type is not None or jnp.issubdtype(labels.dtype, jnp.integer),
        f'`labels` must be whole numbers in [0, {config.num_class_embeds}), not {labels.dtype}.',
      )
    if (sizes := condition.sizes) is not None:
      total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
      p, n = condition.pooled.shape[1], sizes.shape[1]
      require(
        p + each * n == total,
        f'`pooled` [{b} p] and `sizes` [{b} n] must have p + {each} n = {total} '
        f'(projection_class_embeddings_input_dim), but p is {p} and n is {n}.',
      )


class UNet(Encoder):
  """x, time and conditions -> an array shaped like x (with out_channels)."""

  def __init__(self, config: UNetConfig, **kw):
    super().__init__(config, **kw)
    width, levels = config.block_out_channels[0], range(len(config.block_out_channels))
    self.up_blocks = nnx.List([UpBlock(config, step, **kw) for step in levels])
    self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps, **kw)
    self.conv_out = Conv(width, config.out_channels, **kw)

  def __call__(
    self, x: Latents, t: Timesteps, condition: Condition, residuals: Residuals | None = None
  ) -> Latents:
    """x [b h w c], t [b] in [0, T) and the config's `conditions` -> [b h w o].

    condition: labels [b] are a class or a noise level, [b p] where class_embed_type is
    'projection'; sizes and pooled text are Stable Diffusion XL's (Podell et al. 2023, sec. 2.2);
    guidance [b] is the scale of classifier-free guidance that is imitated, 1 for none.
    residuals: a ControlNet's, arrays to add to the skips, and one to the mid block's result.
    UserError: see `Denoiser.join`; residuals of another U-Net.
    """
    x = self.join(x, t, condition)
    return self.run_all(self._predict, x, t, condition, residuals)

  def _predict(self, x, t, condition: Condition, residuals: Residuals | None) -> Latents:
    time, text = self.embed(t, condition), masked(condition.text, condition.mask)
    x, skips = self.descend(constrain(self.conv_in(x), 'image'), time, text)
    if residuals is not None:
      x, skips = _controlled(x, skips, residuals)
    for block in self.up_blocks:
      x = block(x, skips, time, text)
    return self.run(self._finish, x)

  def _finish(self, x: jax.Array) -> Latents:
    return constrain(self.conv_out(self.conv_norm_out(x, activate=True)), 'image')


def _controlled(
  x: jax.Array, skips: list[jax.Array], residuals: Residuals
) -> tuple[jax.Array, list[jax.Array]]:
  """Add a ControlNet's residuals, which may be [b 1 1 c], in the U-Net's own type."""
  targets, additions = [*skips, x], [*residuals[0], residuals[1]]
  require(
    len(targets) == len(additions),
    f'The residuals must hold {len(skips)} arrays for the skips and one for the mid block, '
    f'not {len(residuals[0])} and one; use a ControlNet made for this U-Net.',
  )
  for n, (target, addition) in enumerate(zip(targets, additions, strict=True)):
    b, _, _, c = target.shape
    require(
      addition.shape in (target.shape, (b, 1, 1, c)),
      f'Residual {n} has shape {list(addition.shape)}, but must have {list(target.shape)}; use a '
      'ControlNet made for this U-Net, and a control image of the size of its images.',
    )
  *skips, x = [y + r.astype(y.dtype) for y, r in zip(targets, additions, strict=True)]
  return x, skips
