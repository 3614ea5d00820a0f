"""config.json of the autoencoders."""

import dataclasses
from typing import Any

from diffusion_jax.io.published.common import ANY, ours
from diffusion_jax.models.autoencoder import AutoencoderKLConfig

_AUTOENCODER = {
  'act_fn': 'silu', 'use_quant_conv': True, 'use_post_quant_conv': True, 'force_upcast': ANY,
  'sample_size': ANY,
}


def read_autoencoder(values: dict[str, Any], where: str) -> AutoencoderKLConfig:
  """diffusers' AutoencoderKL."""
  # Defaults of diffusers that differ from ours.
  values = {'block_out_channels': [64], 'layers_per_block': 1} | values
  levels = len(values['block_out_channels'])
  kinds = {'down_block_types': 'DownEncoderBlock2D', 'up_block_types': 'UpDecoderBlock2D'}
  blocks = {key: [kind] * levels for key, kind in kinds.items()}
  values['shift_factor'] = values.get('shift_factor') or 0.0
  return ours(AutoencoderKLConfig, values, _AUTOENCODER | blocks, where)


def write_autoencoder(config: AutoencoderKLConfig) -> dict[str, Any]:
  levels = len(config.block_out_channels)
  return dataclasses.asdict(config) | {
    '_class_name': 'AutoencoderKL',
    'act_fn': 'silu',
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
    'shift_factor': config.shift_factor or None,
  }
