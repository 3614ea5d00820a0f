"""Configs of the U-Net and of what it shares with a ControlNet.

Field names are the keys of the config.json of diffusers' UNet2DConditionModel.
"""

import dataclasses
from typing import Any

from diffusion_jax.models.checks import (
  MOST_EDGE,
  MOST_LAYERS,
  above_zero,
  all_positive,
  freeze_lists,
  groups_divide,
  positive,
  require,
  some_blocks,
)

DOWN_BLOCKS = ('CrossAttnDownBlock2D', 'DownBlock2D')
MID_BLOCKS = ('UNetMidBlock2DCrossAttn', 'UNetMidBlock2D')
UP_BLOCKS = ('CrossAttnUpBlock2D', 'UpBlock2D')


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Shape of the half that a U-Net and its ControlNets share, from the input to the mid block.

  The defaults are Stable Diffusion 1's. Where a field takes one value or one per level, levels
  count from the highest resolution down.

  mid_block_type: with attention, without (UNetMidBlock2D), or None for no mid block at all.
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

  in_channels: int = 4
  down_block_types: tuple[str, ...] = (*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D')
  mid_block_type: str | None = 'UNetMidBlock2DCrossAttn'
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 768
  transformer_layers_per_block: int | tuple[int, ...] = 1
  attention_head_dim: int | tuple[int, ...] = 8
  only_cross_attention: bool | tuple[bool, ...] = False
  use_linear_projection: bool = False
  upcast_attention: bool = False
  resnet_time_scale_shift: str = 'default'
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  class_embed_type: str | None = None
  num_class_embeds: int | None = None
  projection_class_embeddings_input_dim: int | None = None
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None

  def __post_init__(self):
    freeze_lists(self)
    positive(self, 'in_channels', 'norm_num_groups', 'cross_attention_dim')
    all_positive(self, 'block_out_channels', 'attention_head_dim')
    positive(self, 'layers_per_block', most=MOST_LAYERS)
    all_positive(self, 'transformer_layers_per_block', most=MOST_LAYERS)
    above_zero(self, 'norm_eps', most=1)
    self._one('freq_shift', (0, 1))
    groups_divide(self)
    for name in self._per_level_fields():
      self._check_length(name)
    # Down, up and in the middle: residual blocks, with transformer blocks in each attention.
    some_blocks(self, 2 * self.layers_per_block * sum(1 + n for n in self.depths) + self.depths[-1])
    self._each('down_block_types', DOWN_BLOCKS)
    self._one('mid_block_type', (*MID_BLOCKS, None))
    self._one('resnet_time_scale_shift', ('default', 'scale_shift'))
    self._one('class_embed_type', (None, 'timestep', 'projection'))
    self._one('addition_embed_type', (None, 'text_time'))
    self._check_conditions()
    self._check_attention()

  def _per_level_fields(self) -> tuple[str, ...]:
    return (
      'down_block_types', 'attention_head_dim', 'transformer_layers_per_block',
      'only_cross_attention',
    )

  def _check_length(self, name: str) -> None:
    value, levels = getattr(self, name), len(self.block_out_channels)
    require(
      not isinstance(value, tuple) or len(value) == levels,
      f'{self._name(name)} must have {levels} entries, one per entry of block_out_channels, '
      f'not {value!r}.',
    )

  def _each(self, name: str, known: tuple[str, ...]) -> None:
    for value in getattr(self, name):
      require(
        value in known, f'{self._name(name)} has {value!r}; it may hold only {", ".join(known)}.'
      )

  def _one(self, name: str, known: tuple[str | None, ...]) -> None:
    value = getattr(self, name)
    require(
      value in known,
      f'{self._name(name)}={value!r} is not implemented; use one of {", ".join(map(str, known))}.',
    )

  def _check_conditions(self) -> None:
    needed = {
      'class_embed_type': {'projection': ('projection_class_embeddings_input_dim',)},
      'addition_embed_type': {
        'text_time': ('projection_class_embeddings_input_dim', 'addition_time_embed_dim')
      },
    }
    for kind, of_value in needed.items():
      for name in of_value.get(getattr(self, kind), ()):
        require(
          getattr(self, name) is not None,
          f'{self._name(kind)}={getattr(self, kind)!r} needs {name}; set it.',
        )
    for name in (
      'num_class_embeds', 'projection_class_embeddings_input_dim', 'addition_time_embed_dim'
    ):
      if getattr(self, name) is not None:
        positive(self, name)

  def _check_attention(self) -> None:
    only = self.only_cross_attention
    require(
      all(type(value) is bool for value in (only if isinstance(only, tuple) else (only,))),
      f'{self._name("only_cross_attention")} must be true or false, or one of them per level, '
      f'not {only!r}.',
    )
    for heads, channels in zip(self.heads, self.block_out_channels, strict=True):
      require(
        channels % heads == 0,
        f'{self._name("attention_head_dim")}: {heads} heads do not divide {channels} channels '
        '(the field is the number of heads); choose a divisor.',
      )

  def _name(self, field: str) -> str:
    return f'{type(self).__name__}.{field}'

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads at each level, from the highest resolution down."""
    return self._per_level(self.attention_head_dim)

  @property
  def depths(self) -> tuple[int, ...]:
    """Transformer blocks per attention at each level."""
    return self._per_level(self.transformer_layers_per_block)

  @property
  def only_text(self) -> tuple[bool, ...]:
    """Whether both attentions are to the text, at each level."""
    return self._per_level(self.only_cross_attention)

  def _per_level(self, value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

  @property
  def factor(self) -> int:
    """Height and width of the latents must be multiples of this."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def time_features(self) -> int:
    """Width of the time embedding."""
    return 4 * self.block_out_channels[0]

  @property
  def conditions(self) -> tuple[str, ...]:
    """The keyword arguments that a call must have besides x, t and text."""
    labelled = self.class_embed_type is not None or self.num_class_embeds is not None
    sized = self.addition_embed_type == 'text_time'
    return ('pooled', 'sizes') * sized + ('labels',) * labelled


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
  """Shape of the U-Net; the defaults are Stable Diffusion 1's.

  The published ones are in formats/unet.py. `sample_size` is the side of the
  training latents and does not restrict the network.
  """

  sample_size: int | None = 64
  out_channels: int = 4
  up_block_types: tuple[str, ...] = ('UpBlock2D', *['CrossAttnUpBlock2D'] * 3)

  def __post_init__(self):
    super().__post_init__()
    positive(self, 'out_channels')
    if self.sample_size is not None:
      positive(self, 'sample_size', most=MOST_EDGE)
    self._each('up_block_types', UP_BLOCKS)

  def _per_level_fields(self) -> tuple[str, ...]:
    return (*super()._per_level_fields(), 'up_block_types')
