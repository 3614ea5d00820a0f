"""The U-Net of DDPM (Ho, Jain & Abbeel 2020, appendix B), of pixels alone or with a class.

Names and computation follow diffusers' UNet2DModel, config fields its config.json. Its blocks are
those of `models.unet`, with attention of the positions to each other where a block's type says so.
"""

import dataclasses
from typing import Annotated, Literal

from diffusion_jax.limits import Length, Range
from diffusion_jax.models.config import (
  Edge,
  Epsilon,
  Layers,
  LevelsConfig,
  PerLevel,
  Width,
  Widths,
)
from diffusion_jax.models.denoiser import Shapes
from diffusion_jax.models.unet import UNet

Down = Literal['DownBlock2D', 'AttnDownBlock2D']
Up = Literal['UpBlock2D', 'AttnUpBlock2D']


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(LevelsConfig):
  """The keys of a diffusers UNet2DModel config.json; a tuple has a value for each level.

  attention_head_dim: channels of a head; None for one head; a tuple, which diffusers does not have,
  for each level. add_attention: in the mid block. num_class_embeds: rows of the table of classes,
  with one for that of none where there is guidance; None for a network without classes.
  downsample_padding: 1 on both sides, or 0 for the (0, 1) of DDPM.
  """

  sample_size: Edge | Annotated[tuple[Edge, ...], Length(2, 2)] | None = None
  in_channels: Width = 3
  out_channels: Width = 3
  down_block_types: tuple[Down, ...] = ('DownBlock2D', *['AttnDownBlock2D'] * 3)
  up_block_types: tuple[Up, ...] = (*['AttnUpBlock2D'] * 3, 'UpBlock2D')
  block_out_channels: Widths = (224, 448, 672, 896)
  layers_per_block: Layers = 2
  attention_head_dim: Width | Annotated[tuple[Width, ...], PerLevel] | None = 8
  norm_num_groups: Width = 32
  norm_eps: Epsilon = 1e-5
  downsample_padding: Annotated[int, Range(0, 1)] = 1
  resnet_time_scale_shift: Literal['default', 'scale_shift'] = 'default'
  add_attention: bool = True
  num_class_embeds: Width | None = None
  class_embed_type: Literal['timestep'] | None = None
  flip_sin_to_cos: bool = True
  freq_shift: Annotated[int, Range(0, 1)] = 0

  # What the blocks of `models.unet` ask besides.
  mid_resnets = 2
  addition_embed_type = projection_class_embeddings_input_dim = guidance_features = None
  imitates_guidance = False

  def check(self) -> None:
    levels = len(self.block_out_channels)
    self.check_groups()
    self.check_entries(levels, ('down_block_types', 'up_block_types', 'attention_head_dim'))
    self.check_blocks(2 * self.layers_per_block * levels * 2)
    for level, (width, size) in enumerate(
      zip(self.block_out_channels, self._head_sizes, strict=True)
    ):
      self.require(
        size is None or width % size == 0 or not self._attended(level), 'attention_head_dim',
        f'must divide {width} channels',
      )

  def _attended(self, level: int) -> bool:
    types = self.down_block_types[level], self.up_block_types[-1 - level]
    last = level == len(self.block_out_channels) - 1
    return any('Attn' in name for name in types) or (last and self.add_attention)

  @property
  def _head_sizes(self) -> tuple[int | None, ...]:
    size = self.attention_head_dim
    return size if isinstance(size, tuple) else (size,) * len(self.block_out_channels)

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads at each level, from the highest resolution down."""
    sizes = zip(self.block_out_channels, self._head_sizes, strict=True)
    return tuple(width // (size or width) for width, size in sizes)

  @property
  def layers(self) -> tuple[int, ...]:
    """Residual blocks of each level, on the way down."""
    return (self.layers_per_block,) * len(self.block_out_channels)

  @property
  def mid_block_type(self) -> str:
    return 'AttnMidBlock2D' if self.add_attention else 'UNetMidBlock2D'

  @property
  def conditions(self) -> Shapes:
    """What a call must be conditioned on."""
    return {'labels': ()} if self.labelled else {}

  def trained_at(self, height: int, width: int) -> 'UNet2DConfig':
    """Return the config of the same network, trained on x of that size."""
    return dataclasses.replace(self, sample_size=height if height == width else (height, width))


class UNet2D(UNet):
  """x, time and, by the config, labels -> an array shaped like x (with out_channels)."""

  def __init__(self, config: UNet2DConfig, **kw):
    super().__init__(config, **kw)
