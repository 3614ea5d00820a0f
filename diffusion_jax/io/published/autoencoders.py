"""config.json of the autoencoders."""

import dataclasses
from typing import Any

from diffusion_jax.io.published.common import ANY, ours
from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.autoencoder_tiny import AutoencoderTinyConfig
from diffusion_jax.models.vq import VQConfig

_VQ = {'act_fn': 'silu', 'norm_type': 'group', 'force_upcast': ANY}
_TINY = {
  'upsample_fn': 'nearest', 'upsampling_scaling_factor': 2, 'force_upcast': ANY,
  'block_out_channels': ANY,  # A copy of decoder_block_out_channels.
}


def read_autoencoder(values: dict[str, Any], where: str) -> AutoencoderKLConfig:
  """diffusers' AutoencoderKL."""
  # Defaults of diffusers that differ from ours.
  values = {'block_out_channels': [64], 'layers_per_block': 1} | values
  if values.get('shift_factor') is None:
    values['shift_factor'] = 0.0
  return ours(AutoencoderKLConfig, values, {'act_fn': 'silu'}, where)


def write_autoencoder(config: AutoencoderKLConfig) -> dict[str, Any]:
  return _known(config) | {
    '_class_name': 'AutoencoderKL', 'act_fn': 'silu', 'shift_factor': config.shift_factor or None,
  }


def read_vq(values: dict[str, Any], where: str) -> VQConfig:
  """diffusers' VQModel."""
  values = {'block_out_channels': [64], 'layers_per_block': 1, 'num_vq_embeddings': 256} | values
  return ours(VQConfig, values, _VQ, where)


def write_vq(config: VQConfig) -> dict[str, Any]:
  return _known(config) | {'_class_name': 'VQModel', 'act_fn': 'silu', 'norm_type': 'group'}


def read_autoencoder_tiny(values: dict[str, Any], where: str) -> AutoencoderTinyConfig:
  """diffusers' AutoencoderTiny."""
  return ours(AutoencoderTinyConfig, values, _TINY, where)


def write_autoencoder_tiny(config: AutoencoderTinyConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'AutoencoderTiny'}


def _known(config: Any) -> dict[str, Any]:
  """All fields; diffusers fails on a sample_size of null."""
  values = dataclasses.asdict(config)
  if config.sample_size is None:
    del values['sample_size']
  return values
