"""config.json of the U-Net and of the ControlNet."""

import dataclasses
from typing import Any

from diffusion_jax.io.published.common import ANY, ours
from diffusion_jax.models.controlnet import ControlNetConfig
from diffusion_jax.models.unet_config import UNetConfig

_BOTH = {
  'act_fn': 'silu', 'downsample_padding': 1, 'mid_block_scale_factor': 1,
  'addition_embed_type_num_heads': ANY,
}
_UNET = _BOTH | {
  'center_input_sample': False, 'dropout': 0.0, 'dual_cross_attention': False,
  'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1.0, 'conv_in_kernel': 3,
  'conv_out_kernel': 3, 'time_embedding_type': 'positional', 'attention_type': 'default',
  'class_embeddings_concat': False,
  'mid_block_only_cross_attention': ANY,  # Of a mid block that we refuse.
}
# Defaults of diffusers that differ from ours.
_DEFAULTS = {'cross_attention_dim': 1280}


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
  """Where diffusers takes null for false."""
  return values if values.get('upcast_attention') is not None else (
    values | {'upcast_attention': False}
  )


def read_unet(values: dict[str, Any], where: str) -> UNetConfig:
  """diffusers' UNet2DConditionModel."""
  values = _without_null({'sample_size': None} | _DEFAULTS | values)
  return ours(UNetConfig, values, _UNET, where)


def write_unet(config: UNetConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'UNet2DConditionModel', 'act_fn': 'silu'}


def read_controlnet(values: dict[str, Any], where: str) -> ControlNetConfig:
  """diffusers' ControlNetModel, in which num_attention_heads goes before attention_head_dim."""
  values = _without_null(_DEFAULTS | values)
  heads = values.pop('num_attention_heads', None)
  if heads is not None:
    values['attention_head_dim'] = heads
  return ours(ControlNetConfig, values, _BOTH, where)


def write_controlnet(config: ControlNetConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'ControlNetModel', 'act_fn': 'silu'}
