"""preprocessor_config.json: what pixels an image encoder was trained on."""

import math
from pathlib import Path
from typing import Any

from diffusion_jax.formats.tensors import read_json
from diffusion_jax.models.checks import require, shown


def read_pixels(file: Path) -> dict[str, tuple[float, ...]]:
  """'mean' and 'std' of pixels in [0, 1], for red, green and blue, of those that the file says.

  UserError for anything but three finite numbers, a std above zero.
  """
  values = read_json(file)
  found = {}
  for name in ('mean', 'std'):
    value = values.get(f'image_{name}')
    if value is None:
      continue
    require(
      isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))
      and (name == 'mean' or min(value) > 0),
      f'{file}: image_{name} is {shown(value)}; it must be three finite numbers'
      f'{" above zero" * (name == "std")}.',
    )
    found[name] = tuple(map(float, value))
  return found


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 1e6
