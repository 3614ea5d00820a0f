"""What a network takes, by its config alone: heights, widths, channels, guidance; and noise."""

import math
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.limits import EdgeRule


def edge_rule(factor: int, *configs: Any) -> EdgeRule:
  """Return what heights and widths of images networks with these configs take in a space of that
  factor."""
  multiple = factor * math.lcm(*(getattr(config, 'factor', 1) for config in configs))
  most = [config.most for config in configs if getattr(config, 'most', None)]
  return EdgeRule(multiple, min(most) * factor // multiple * multiple if most else None)


def output_channels(config: Any) -> int | None:
  """Output channels of a denoiser, or None if not in its config."""
  found = (getattr(config, name, None) for name in ('out_channels', 'out_features', 'in_channels'))
  return next((channels for channels in found if channels is not None), None)


def check_imitation(config: Any, negative: str) -> None:
  """Raise UserError for guidance beside that which the denoiser imitates."""
  if config.guidance != 1:
    raise UserError(
      f'guidance is {config.guidance:g}, but the denoiser imitates guidance (its config has '
      f'time_cond_proj_dim); set guidance to 1, and distilled_guidance to {config.guidance:g}.'
    )
  if negative:
    raise UserError(
      f'the negative prompt {negative!r} has no effect on a denoiser that imitates guidance (its '
      'config has time_cond_proj_dim); leave it out.'
    )


def checked_noise(given: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return noise as float32. UserError for another shape."""
  if given.shape != shape:
    raise UserError(f'noise is {list(given.shape)}; give one array for each prompt, {list(shape)}.')
  return np.asarray(given, np.float32)
