"""config.json of the U-Net."""

import dataclasses
from typing import Any

from diffusion_jax.io.published.common import ANY, ours
from diffusion_jax.models.unet_config import UNetConfig

_UNET = {
  'act_fn': 'silu', 'center_input_sample': False, 'mid_block_type': 'UNetMidBlock2DCrossAttn',
  'only_cross_attention': False, 'downsample_padding': 1, 'mid_block_scale_factor': 1,
  'dropout': 0.0, 'dual_cross_attention': False, 'resnet_time_scale_shift': 'default',
  'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1.0, 'conv_in_kernel': 3,
  'conv_out_kernel': 3, 'time_embedding_type': 'positional', 'attention_type': 'default',
  'class_embeddings_concat': False, 'addition_embed_type_num_heads': ANY,
  'upcast_attention': ANY,  # Our softmax is always in float32.
}


def read_unet(values: dict[str, Any], where: str) -> UNetConfig:
  """diffusers' UNet2DConditionModel."""
  values = {'sample_size': None, 'cross_attention_dim': 1280} | values
  return ours(UNetConfig, values, _UNET, where)


def write_unet(config: UNetConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'UNet2DConditionModel', 'act_fn': 'silu'}
