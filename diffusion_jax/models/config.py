"""The base of network configs, and the check of input sizes."""

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from diffusion_jax.config import convert
from diffusion_jax.errors import require
from diffusion_jax.limits import EdgeRule, Length, Range

Width = Annotated[int, Range(1, 2**20)]
"""Channels, heads, a vocabulary: the limit is beyond every network; shapes stay numbers."""
Edge = Annotated[int, Range(1, 2**13)]
"""Height or width of an image or its latents."""
MOST_LAYERS = 512
Layers = Annotated[int, Range(1, MOST_LAYERS)]
"""A number of blocks: tracing each takes milliseconds."""
Epsilon = Annotated[float, Range(0, 1, above=True)]
Factor = Annotated[float, Range(0, 1e6, above=True)]
Shift = Annotated[float, Range(-1e6, 1e6)]

PerLevel = Length(1, 12)
"""The length of a tuple with an entry for each resolution."""
Widths = Annotated[tuple[Width, ...], PerLevel]
LayersPerLevel = Annotated[tuple[Layers, ...], PerLevel]


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """A config whose fields are held against their types; lists, as JSON has them, become tuples."""

  def __post_init__(self):
    name = type(self).__name__
    for field, hint in _hints(type(self)).items():
      object.__setattr__(self, field, convert(hint, getattr(self, field), f'{name}.{field}'))
    self.check()

  def check(self) -> None:
    """Raise UserError for what the types of single fields cannot say."""

  def require(self, condition: bool, field: str, remedy: str) -> None:
    """Raise UserError, naming the field and its value, unless `condition` holds."""
    value = getattr(self, field)
    require(condition, f'{type(self).__name__}.{field} is {value!r:.100}; it {remedy}.')

  def check_entries(self, count: int, fields: Sequence[str]) -> None:
    """Raise UserError unless each of the fields, where it is there and a tuple, has so many."""
    for field in fields:
      value = getattr(self, field, None)
      if isinstance(value, tuple):
        fits = len(value) == count
        self.require(fits, field, f'must have {count} entries, one for each level')

  def check_blocks(self, count: int) -> None:
    """Raise UserError for more blocks than any network has."""
    require(
      count <= MOST_LAYERS,
      f'{type(self).__name__} describes {count:,} blocks, where {MOST_LAYERS} are allowed; lower '
      'its layers.',
    )

  def check_groups(self) -> None:
    """Raise UserError unless norm_num_groups divides all of block_out_channels."""
    fits = all(width % self.norm_num_groups == 0 for width in self.block_out_channels)
    self.require(
      fits, 'block_out_channels', f'must hold multiples of norm_num_groups={self.norm_num_groups}'
    )


class LevelsConfig(NetworkConfig):
  """What follows from the levels of any U-Net, and from whether it takes labels."""

  @property
  def factor(self) -> int:
    """Height and width of x must be multiples of this."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def time_features(self) -> int:
    """Width of the time embedding."""
    return 4 * self.block_out_channels[0]

  @property
  def labelled(self) -> bool:
    """True if the embedding of a label is added to that of the time."""
    return self.class_embed_type is not None or self.num_class_embeds is not None


@functools.cache
def _hints(config: type) -> dict[str, Any]:
  return typing.get_type_hints(config, include_extras=True)


def check_size(
  shape: tuple[int, ...], channels: int, factor: int, what: str, most: int | None = None
) -> None:
  """Raise UserError unless `shape` is [b h w channels] with h and w multiples of `factor`, of at
  most `most`."""
  require(len(shape) == 4, f'{what} must have shape [b h w c], not {list(shape)}.')
  require(
    shape[-1] == channels, f'{what} must have {channels} channels, not {shape[-1]} ({list(shape)}).'
  )
  rule = EdgeRule(factor, most)
  near = 'x'.join(map(str, rule.near(*shape[1:3])))
  require(
    rule.fits(*shape[1:3]),
    f'{what} of {shape[1]}x{shape[2]} cannot be divided as the network does: height and width must '
    f'be {rule}; the nearest such size is {near}.',
  )
