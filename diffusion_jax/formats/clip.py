"""CLIP: config.json of its towers, published configs, and its pixels."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import require, shown
from diffusion_jax.formats.published import GENERAL, NetworkFormat
from diffusion_jax.models.text.clip import CLIP as CLIPModule
from diffusion_jax.models.text.clip import (
  CLIPConfig,
  CLIPTextConfig,
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPTextProjectionConfig,
  CLIPVisionConfig,
  CLIPVisionModel,
  CLIPVisionModelWithProjection,
  CLIPVisionProjectionConfig,
)


def _without_positions(name: str) -> str | None:
  return None if name.endswith('position_ids') else name


def _in_tower(prefix: str, name: str) -> str | None:
  """transformers 5 leaves the prefix out of a tower without a projection."""
  if name.endswith('position_ids'):
    return None
  return name if name.startswith((prefix, 'text_projection.', 'visual_projection.')) else (
    prefix + name
  )


def _tower(module: type, config: type, tower: str) -> NetworkFormat:
  """Return the format of one tower of CLIP on its own."""
  return NetworkFormat(
    module, config, ([module.__name__],), 'architectures', accepted=GENERAL,
    written={'model_type': f'clip_{tower}_model'},
    rename=functools.partial(_in_tower, f'{tower}_model.'),
  )


TEXT = _tower(CLIPTextModel, CLIPTextConfig, 'text')
TEXT_PROJECTION = _tower(CLIPTextModelWithProjection, CLIPTextProjectionConfig, 'text')
VISION = _tower(CLIPVisionModel, CLIPVisionConfig, 'vision')
VISION_PROJECTION = _tower(CLIPVisionModelWithProjection, CLIPVisionProjectionConfig, 'vision')


class _CLIPFormat(NetworkFormat):
  """Both towers. The old *_config_dict entries override the *_config ones."""

  def parse(self, values: Mapping[str, Any], where: str) -> CLIPConfig:
    values = dict(values)
    for name in ('text_config', 'vision_config'):
      given = [values.get(name) or {}, values.pop(f'{name}_dict', None) or {}]
      require(all(isinstance(g, dict) for g in given), f'{where}: {name} must be a JSON object.')
      values[name] = given[0] | given[1]
    return super().parse(values, where)

  def describe(self, config: CLIPConfig) -> dict[str, Any]:
    values = super().describe(config)
    for tower in ('text', 'vision'):
      values[f'{tower}_config'] |= {
        'model_type': f'clip_{tower}_model', 'projection_dim': config.projection_dim
      }
    return values


CLIP = _CLIPFormat(
  CLIPModule, CLIPConfig, ('clip',), 'model_type', accepted=GENERAL,
  written={'architectures': ['CLIPModel']}, rename=_without_positions,
)

TEXT_ENCODERS: dict[str, CLIPTextConfig] = {
  # OpenAI's ViT-L/14: Stable Diffusion 1, and the first text encoder of XL.
  'clip_l': CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
  ),
  # The same with its projection: the first of Stable Diffusion 3.
  'clip_l_projection': CLIPTextProjectionConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2,
    projection_dim=768,
  ),
  # OpenCLIP's ViT-H/14 without its last layer: Stable Diffusion 2.
  'openclip_h': CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act='gelu', eos_token_id=2,
  ),
  # OpenCLIP's ViT-bigG/14: the second text encoder of Stable Diffusion XL.
  'openclip_bigg': CLIPTextProjectionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act='gelu', eos_token_id=2, projection_dim=1280,
  ),
}
"""The text encoders of published diffusion models by name."""

PREPROCESSOR = 'preprocessor_config.json'
"""The file beside a network that says which pixels it sees."""
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation for towers that are trained here, which see [-1, 1]."""


def pixel_statistics(values: Mapping[str, Any], file: str) -> dict[str, tuple[float, ...]]:
  """'mean' and 'std' per channel of pixels in [0, 1], where given, of preprocessor_config.json.

  UserError: anything but three finite numbers, a std above zero.
  """
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
