"""config.json of DINOv2 in transformers, and its published sizes."""

import dataclasses
from typing import Any

from diffusion_jax.formats.published import ANY, parse_config
from diffusion_jax.formats.text import GENERAL
from diffusion_jax.models.vision.dinov2 import DINOv2Config

MODEL_TYPES = ('dinov2', 'dinov2_with_registers')
_ARCHITECTURES = dict(zip(MODEL_TYPES, ('Dinov2Model', 'Dinov2WithRegistersModel'), strict=True))
_TRAINING = dict.fromkeys((
  'apply_layernorm', 'attention_probs_dropout_prob', 'drop_path_rate', 'hidden_dropout_prob',
  'interpolate_antialias', 'interpolate_offset', 'out_features', 'out_indices',
  'reshape_hidden_states', 'stage_names',
), ANY)

DINOV2 = {
  'small': DINOv2Config(hidden_size=384, num_attention_heads=6),
  'base': DINOv2Config(),
  'large': DINOv2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
  'giant': DINOv2Config(
    hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True
  ),
}
"""ViT-S/14, B/14, L/14 and g/14."""


def read_dinov2(values: dict[str, Any], where: str) -> DINOv2Config:
  """transformers' Dinov2Model or Dinov2WithRegistersModel."""
  # What transformers takes where a key is missing; our own defaults are published networks'.
  values = {'image_size': 224} | values
  if values.get('model_type') == 'dinov2_with_registers':
    values = {'num_register_tokens': 4, 'patch_size': 16} | values
  return parse_config(DINOv2Config, values, GENERAL | _TRAINING, where)


def write_dinov2(config: DINOv2Config) -> dict[str, Any]:
  values = dataclasses.asdict(config)
  name = MODEL_TYPES[bool(config.num_register_tokens)]
  if not config.num_register_tokens:
    del values['num_register_tokens']
  return values | {'model_type': name, 'architectures': [_ARCHITECTURES[name]]}
