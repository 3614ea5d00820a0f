"""What heights, widths and channels a network takes, by its config alone."""

import math
from typing import Any

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
