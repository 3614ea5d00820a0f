"""The transformer denoisers: config.json and published configs."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import require, shown
from diffusion_jax.formats.published import ANY, NetworkFormat
from diffusion_jax.models.dit import OPTIONS, DiT, DiTConfig
from diffusion_jax.models.flux import Flux, FluxConfig
from diffusion_jax.models.mmdit import MMDiT, MMDiTConfig
from diffusion_jax.models.pixart import PixArt, PixArtConfig


class _Format(NetworkFormat):
  """Those of DiT and PixArt; the first files of both have a class that was shared with U-Nets."""

  def matches(self, values: Mapping[str, Any]) -> bool:
    older = values.get(self.key) == 'Transformer2DModel'
    return super().matches(values) or (older and self.written.items() <= values.items())


class _DiTFormat(_Format):
  """A DiT whose blocks share one embedding has a class name of ours: diffusers has none such.

  Other options that diffusers does not have are written where they are set.
  """

  def parse(self, values: Mapping[str, Any], where: str) -> DiTConfig:
    shared = values.get('_class_name') == 'DiT'
    return super().parse({**values, 'shared_embedding': shared}, where)

  def describe(self, config: DiTConfig) -> dict[str, Any]:
    values, options = super().describe(config), config.added()
    values = {k: v for k, v in values.items() if k not in OPTIONS or k in options}
    return values | {'_class_name': self.names[values.pop('shared_embedding')]}


DIT = _DiTFormat(
  DiT, DiTConfig, ('DiTTransformer2DModel', 'DiT'), defaults={'out_channels': None},
  accepted={
    'dropout': 0.0, 'norm_num_groups': ANY, 'activation_fn': 'gelu-approximate',
    'upcast_attention': ANY, 'norm_type': 'ada_norm_zero', 'norm_elementwise_affine': False,
    'attention_type': 'default', 'use_linear_projection': ANY, 'only_cross_attention': False,
    'double_self_attention': False,
  },
  written={'norm_type': 'ada_norm_zero'},
)


class _MMDiTFormat(NetworkFormat):
  """An MMDiT with other positions, or without pooled text, has a class name of ours, too."""

  def describe(self, config: MMDiTConfig) -> dict[str, Any]:
    values = super().describe(config)
    if config.positions == 'sincos':
      values.pop('positions')
    own = 'positions' in values or config.pooled_projection_dim is None
    return values | {'_class_name': self.names[own]}


MMDIT = _MMDiTFormat(MMDiT, MMDiTConfig, ('SD3Transformer2DModel', 'MMDiT'))
PIXART = _Format(
  PixArt, PixArtConfig, ('PixArtTransformer2DModel',),
  accepted={
    'dropout': 0.0, 'norm_num_groups': ANY, 'activation_fn': 'gelu-approximate',
    'upcast_attention': ANY, 'norm_type': 'ada_norm_single', 'norm_elementwise_affine': False,
    'num_embeds_ada_norm': ANY, 'attention_type': 'default', 'use_linear_projection': ANY,
    'num_vector_embeds': ANY, 'double_self_attention': False, 'only_cross_attention': False,
  },
  written={'norm_type': 'ada_norm_single'},
)


class _FluxFormat(NetworkFormat):
  """diffusers counts channels of joined patches of 2 x 2, and says that patch_size is 1."""

  def parse(self, values: Mapping[str, Any], where: str) -> FluxConfig:
    counted = {}
    for name in ('in_channels', 'out_channels'):
      value = values.get(name)
      if value is not None:
        require(
          isinstance(value, int) and value % 4 == 0,
          f'{where}: {name} is {shown(value)}; it must be a multiple of 4.',
        )
        counted[name] = value // 4
    patch = values.get('patch_size', 1)
    one = type(patch) is int and patch == 1
    require(one, f'{where}: patch_size is {shown(patch)}; it must be 1.')
    return super().parse({**values, **counted, 'patch_size': 2}, where)

  def describe(self, config: FluxConfig) -> dict[str, Any]:
    values = super().describe(config) | {'patch_size': 1, 'in_channels': 4 * config.in_channels}
    values.pop('sample_size')
    out = config.out_channels
    return values | {'out_channels': out if out is None else 4 * out}


FLUX = _FluxFormat(Flux, FluxConfig, ('FluxTransformer2DModel',))

TRANSFORMERS: dict[str, DiTConfig | MMDiTConfig | FluxConfig | PixArtConfig] = {
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
  'flux_dev': FluxConfig(guidance_embeds=True),
  'flux_schnell': FluxConfig(),
  'pixart_alpha': PixArtConfig(caption_channels=4096),
  'pixart_sigma': PixArtConfig(
    caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
  ),
}
"""The published ones by name."""
