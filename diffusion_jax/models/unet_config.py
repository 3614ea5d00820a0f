"""Config of the U-Net; field names are the keys of diffusers' UNet2DConditionModel config.json."""

import dataclasses

from diffusion_jax.models.checks import all_positive, freeze_lists, groups_divide, positive, require

DOWN_BLOCKS = ('CrossAttnDownBlock2D', 'DownBlock2D')
UP_BLOCKS = ('CrossAttnUpBlock2D', 'UpBlock2D')


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """Shape of the U-Net; the defaults are Stable Diffusion 1's.

  Stable Diffusion 2 has cross_attention_dim 1024, attention_head_dim (5, 10, 20, 20) and
  use_linear_projection. `attention_head_dim` is, for historical reasons, the NUMBER of heads at
  each level; like `transformer_layers_per_block` it is one number or one per level.
  `sample_size` is the side of the training latents and does not restrict the network.
  """

  sample_size: int | None = 64
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = (*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D')
  up_block_types: tuple[str, ...] = ('UpBlock2D', *['CrossAttnUpBlock2D'] * 3)
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 768
  transformer_layers_per_block: int | tuple[int, ...] = 1
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False
  flip_sin_to_cos: bool = True
  freq_shift: int = 0

  def __post_init__(self):
    freeze_lists(self)
    positive(
      self, 'in_channels', 'out_channels', 'layers_per_block', 'norm_num_groups',
      'cross_attention_dim',
    )
    all_positive(
      self, 'block_out_channels', 'transformer_layers_per_block', 'attention_head_dim'
    )
    groups_divide(self)
    self._check_lengths()
    self._check_block_types('down_block_types', DOWN_BLOCKS)
    self._check_block_types('up_block_types', UP_BLOCKS)
    for heads, channels in zip(self.heads, self.block_out_channels, strict=True):
      require(
        channels % heads == 0,
        f'UNetConfig.attention_head_dim: {heads} heads do not divide {channels} channels '
        '(the field is the number of heads); choose a divisor.',
      )

  def _check_lengths(self) -> None:
    levels = len(self.block_out_channels)
    for name in (
      'down_block_types', 'up_block_types', 'attention_head_dim', 'transformer_layers_per_block'
    ):
      value = getattr(self, name)
      require(
        isinstance(value, int) or len(value) == levels,
        f'UNetConfig.{name} must have {levels} entries, one per entry of block_out_channels, '
        f'not {value!r}.',
      )

  def _check_block_types(self, name: str, known: tuple[str, ...]) -> None:
    for value in getattr(self, name):
      require(
        value in known, f'UNetConfig.{name} has {value!r}; it may hold only {", ".join(known)}.'
      )

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads at each level, from the highest resolution down."""
    return self._per_level(self.attention_head_dim)

  @property
  def depths(self) -> tuple[int, ...]:
    """Transformer blocks per attention at each level."""
    return self._per_level(self.transformer_layers_per_block)

  def _per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

  @property
  def factor(self) -> int:
    """Height and width of the latents must be multiples of this."""
    return 2 ** (len(self.block_out_channels) - 1)
