"""The transformer denoisers: config.json and published configs."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.formats.published import ANY, NetworkFormat
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig


class _DiTFormat(NetworkFormat):
  """A DiT with a shared embedding has a class name of ours: diffusers has none such."""

  def parse(self, values: Mapping[str, Any], where: str) -> DiTConfig:
    shared = values.get('_class_name') == 'DiT'
    return super().parse({**values, 'shared_embedding': shared}, where)

  def describe(self, config: DiTConfig) -> dict[str, Any]:
    values = super().describe(config)
    return values | {'_class_name': self.names[values.pop('shared_embedding')]}


DIT = _DiTFormat(
  DiT, DiTConfig, ('DiTTransformer2DModel', 'DiT'), defaults={'out_channels': None},
  accepted={
    'dropout': 0.0, 'norm_num_groups': ANY, 'activation_fn': 'gelu-approximate',
    'upcast_attention': ANY, 'norm_type': 'ada_norm_zero', 'norm_elementwise_affine': False,
  },
  written={'norm_type': 'ada_norm_zero'},
)
MMDIT = NetworkFormat(MMDiT, MMDiTConfig, ('SD3Transformer2DModel',))

TRANSFORMERS: dict[str, DiTConfig | MMDiTConfig] = {
  'dit_xl_2_256': DiTConfig(),
  'dit_xl_2_512': DiTConfig(sample_size=64),
  'sd3_medium': MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
  ),
  'sd35_medium': MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm='rms_norm',
  ),
  'sd35_large': MMDiTConfig(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
    qk_norm='rms_norm',
  ),
}
"""The published ones by name."""
