"""DINOv2 in transformers: config.json, and its published sizes."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.formats.published import ANY, GENERAL, NetworkFormat
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config

MODEL_TYPES = {'dinov2': 'Dinov2Model', 'dinov2_with_registers': 'Dinov2WithRegistersModel'}
"""model_type in config.json -> the class of transformers."""
_TRAINING = dict.fromkeys((
  'apply_layernorm', 'attention_probs_dropout_prob', 'drop_path_rate', 'hidden_dropout_prob',
  'interpolate_antialias', 'interpolate_offset', 'out_features', 'out_indices',
  'reshape_hidden_states', 'stage_names',
), ANY)

SIZES = {
  'small': DINOv2Config(hidden_size=384, num_attention_heads=6),
  'base': DINOv2Config(),
  'large': DINOv2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
  'giant': DINOv2Config(
    hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True
  ),
}
"""ViT-S/14, B/14, L/14 and g/14."""


def _body(name: str) -> str | None:
  """A network with a head for classes has the body under a prefix; the head is left out."""
  if name.startswith('classifier.'):
    return None
  return name.removeprefix('dinov2.').removeprefix('dinov2_with_registers.')


class _DINOv2Format(NetworkFormat):
  """With registers and without, which have different names and defaults."""

  def parse(self, values: Mapping[str, Any], where: str) -> DINOv2Config:
    # What transformers takes where a key is missing; our own defaults are published networks'.
    registers = values.get('model_type') == 'dinov2_with_registers'
    more = {'num_register_tokens': 4, 'patch_size': 16} if registers else {}
    return super().parse({'image_size': 224, **more, **values}, where)

  def describe(self, config: DINOv2Config) -> dict[str, Any]:
    values = super().describe(config)
    name = self.names[bool(config.num_register_tokens)]
    if not config.num_register_tokens:
      del values['num_register_tokens']
    return values | {'model_type': name, 'architectures': [MODEL_TYPES[name]]}


DINOV2 = _DINOv2Format(
  DINOv2, DINOv2Config, tuple(MODEL_TYPES), 'model_type', accepted=GENERAL | _TRAINING,
  rename=_body,
)
