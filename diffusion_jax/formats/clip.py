"""CLIP: config.json of its towers, published configs, names in a single file, and its pixels."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import require, shown
from diffusion_jax.formats.published import GENERAL, NetworkFormat, Rule, same
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
  """transformers 5 leaves the prefix out of a tower alone, and writes it beside a projection."""
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

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = {
  'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
  'self_attn.out_proj': 'attn.out_proj',
}
_LEAVES = ('weight', 'bias')


def clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """transformers' names, as they are."""
  tower = 'text_model'
  modules = [f'{tower}.final_layer_norm']
  for i in range(layers):
    modules += [
      f'{tower}.encoder.layers.{i}.{name}'
      for name in (*_LAYER, *(f'self_attn.{part}_proj' for part in 'qkv'))
    ]
  found = [rule for module in modules for rule in same(module, module)]
  tables = [f'{tower}.embeddings.{name}_embedding' for name in ('token', 'position')]
  for name in tables + ['text_projection'] * projection:
    found += same(name, name, ['weight'])
  return found


def open_clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """OpenCLIP's: queries, keys and values in one matrix, the projection as [in out]."""
  tower = 'text_model'
  found = [
    *same(f'{tower}.final_layer_norm', 'ln_final'),
    *same(f'{tower}.embeddings.token_embedding', 'token_embedding', ['weight']),
    Rule((f'{tower}.embeddings.position_embedding.weight',), 'positional_embedding'),
  ]
  if projection:
    found.append(Rule(('text_projection.weight',), 'text_projection', 'transposed'))
  for i in range(layers):
    ours, theirs = f'{tower}.encoder.layers.{i}', f'transformer.resblocks.{i}'
    for name, stored in _LAYER.items():
      found += same(f'{ours}.{name}', f'{theirs}.{stored}')
    for leaf in _LEAVES:
      parts = tuple(f'{ours}.self_attn.{part}_proj.{leaf}' for part in 'qkv')
      found.append(Rule(parts, f'{theirs}.attn.in_proj_{leaf}', 'stacked'))
  return found


def clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in transformers' names, of CLIP ViT-L's kind."""
  tower = 'text_model'
  return _config(
    where, shapes.get(f'{tower}.embeddings.token_embedding.weight'),
    shapes.get(f'{tower}.embeddings.position_embedding.weight'),
    shapes.get(f'{tower}.encoder.layers.0.mlp.fc1.weight'),
    _count(r'text_model\.encoder\.layers\.(\d{1,4})\.', shapes), 'quick_gelu', None,
  )


def open_clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in OpenCLIP's names, with a projection where they have one."""
  return _config(
    where, shapes.get('token_embedding.weight'), shapes.get('positional_embedding'),
    shapes.get('transformer.resblocks.0.mlp.c_fc.weight'),
    _count(r'transformer\.resblocks\.(\d{1,4})\.', shapes), 'gelu', shapes.get('text_projection'),
  )


def _config(where, tokens, positions, wide, layers, act, projection) -> dict[str, Any]:
  require(
    tokens is not None and positions is not None and wide is not None,
    f'{where} holds no whole text encoder; give a whole model.',
  )
  width = tokens[1]
  architecture = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return {
    'architectures': [architecture], 'model_type': 'clip_text_model', 'hidden_act': act,
    'vocab_size': tokens[0], 'hidden_size': width, 'intermediate_size': wide[0],
    'num_hidden_layers': layers, 'num_attention_heads': max(1, width // 64),
    'max_position_embeddings': positions[0], 'layer_norm_eps': 1e-5,
    'projection_dim': projection[1] if projection else width,
    # As published: 2 means pooling at the largest id, which is the end of the text.
    'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1,
  }


def _count(pattern: str, shapes: Shapes) -> int:
  found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
  return max(found, default=-1) + 1


def pixel_statistics(values: Mapping[str, Any], file: str) -> dict[str, tuple[float, ...]]:
  """Return 'mean' and 'std' of pixels in [0, 1] for red, green and blue, of those that are said.

  Args:
    values, file: of preprocessor_config.json.

  Raises:
    UserError: for anything but three finite numbers, a std above zero.
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
