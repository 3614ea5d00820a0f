"""Checks that every network's config and input shares. Failures are sentences for people."""

import dataclasses
from typing import Any

from diffusion_jax.errors import UserError


def require(condition: bool, message: str) -> None:
  """Raises UserError(message) unless `condition` holds."""
  if not condition:
    raise UserError(message)


def freeze_lists(config: Any) -> None:
  """Turns the lists that JSON gives into tuples, in place, so that a config stays hashable."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, list):
      object.__setattr__(config, field.name, tuple(value))


def positive(config: Any, *names: str) -> None:
  """Raises UserError unless each named field is one positive whole number."""
  for name in names:
    value = getattr(config, name)
    good = type(value) is int and value > 0
    require(good, f'{type(config).__name__}.{name} must be a positive whole number, not {value!r}.')


def all_positive(config: Any, *names: str) -> None:
  """Raises UserError unless each named field is a positive whole number or a tuple of them."""
  for name in names:
    value = getattr(config, name)
    values = value if isinstance(value, tuple) else (value,)
    good = len(values) > 0 and all(type(v) is int and v > 0 for v in values)
    require(good, f'{type(config).__name__}.{name} must be positive whole numbers, not {value!r}.')


def groups_divide(config: Any) -> None:
  """Raises UserError unless norm_num_groups divides every entry of block_out_channels."""
  for channels in config.block_out_channels:
    require(
      channels % config.norm_num_groups == 0,
      f'{type(config).__name__}.block_out_channels has {channels}, which norm_num_groups='
      f'{config.norm_num_groups} does not divide; choose channels that are a multiple of it.',
    )


def size_fits(shape: tuple[int, ...], channels: int, factor: int, what: str) -> None:
  """Raises UserError unless `shape` is [b h w channels] with h and w multiples of `factor`."""
  require(len(shape) == 4, f'{what} must have shape [b h w c], not {list(shape)}.')
  require(
    shape[-1] == channels, f'{what} must have {channels} channels, not {shape[-1]} ({list(shape)}).'
  )
  require(
    shape[1] % factor == 0 and shape[2] % factor == 0 and shape[1] * shape[2] > 0,
    f'{what} of {shape[1]}x{shape[2]} cannot be halved often enough: height and width must be '
    f'multiples of {factor}.',
  )
