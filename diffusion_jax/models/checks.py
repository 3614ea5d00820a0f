"""Checks that every network's config and input shares. Failures are sentences for people."""

import dataclasses
from typing import Any

from diffusion_jax.errors import require, shown

MOST = 2**20
"""Of a width, a size or a vocabulary: beyond every network, so that shapes stay numbers."""
MOST_EDGE = 2**13
"""Of a picture or its latents, along a side."""
MOST_LAYERS, MOST_LEVELS = 512, 12
"""Of blocks, and of resolutions: what is traced for each takes milliseconds."""


def freeze_lists(config: Any) -> None:
  """Turns the lists that JSON gives into tuples, in place, so that a config stays hashable."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, list):
      object.__setattr__(config, field.name, tuple(value))


def positive(config: Any, *names: str, most: int = MOST) -> None:
  """Raise UserError unless each named field is one positive whole number, `most` at most."""
  for name in names:
    value = getattr(config, name)
    good = type(value) is int and 0 < value <= most
    require(
      good,
      f'{type(config).__name__}.{name} must be a positive whole number, not {shown(value)}'
      + (f'; at most {most:,}.' if type(value) is int and value > most else '.'),
    )


def all_positive(config: Any, *names: str, most: int = MOST) -> None:
  """As `positive`, of fields that are such a number or a tuple of them, MOST_LEVELS at most."""
  for name in names:
    value = getattr(config, name)
    values = value if isinstance(value, tuple) else (value,)
    good = 0 < len(values) <= MOST_LEVELS and all(type(v) is int and 0 < v <= most for v in values)
    require(
      good,
      f'{type(config).__name__}.{name} must be positive whole numbers, not {shown(value)}; at most '
      f'{most:,}, and {MOST_LEVELS} of them.',
    )


def some_blocks(config: Any, count: int) -> None:
  """Raise UserError where a config describes more blocks than any network has."""
  require(
    count <= MOST_LAYERS,
    f'{type(config).__name__} describes {count:,} blocks, where {MOST_LAYERS} are allowed; lower '
    'its layers.',
  )


def above_zero(config: Any, *names: str, most: float = 1e6) -> None:
  """Raise UserError unless each named field is one positive number, `most` at most."""
  for name in names:
    value = getattr(config, name)
    good = type(value) in (int, float) and 0 < value <= most
    require(
      good,
      f'{type(config).__name__}.{name} must be positive, at most {most:g}, not {shown(value)}.',
    )


def groups_divide(config: Any) -> None:
  """Raise UserError unless norm_num_groups divides every entry of block_out_channels."""
  for channels in config.block_out_channels:
    require(
      channels % config.norm_num_groups == 0,
      f'{type(config).__name__}.block_out_channels has {channels}, which norm_num_groups='
      f'{config.norm_num_groups} does not divide; choose channels that are a multiple of it.',
    )


def size_fits(shape: tuple[int, ...], channels: int, factor: int, what: str) -> None:
  """Raise UserError unless `shape` is [b h w channels] with h and w multiples of `factor`."""
  require(len(shape) == 4, f'{what} must have shape [b h w c], not {list(shape)}.')
  require(
    shape[-1] == channels, f'{what} must have {channels} channels, not {shape[-1]} ({list(shape)}).'
  )
  sizes = shape[1:3]
  near = 'x'.join(str(max(round(n / factor), 1) * factor) for n in sizes)
  require(
    all(n > 0 and n % factor == 0 for n in sizes),
    f'{what} of {shape[1]}x{shape[2]} cannot be divided as the network does: height and width must '
    f'be multiples of {factor}; the nearest such size is {near}.',
  )
