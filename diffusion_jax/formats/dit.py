"""config.json of the transformer denoisers, and published architectures by name."""

import dataclasses
from typing import Any

import numpy as np

from diffusion_jax.formats.published import ANY, parse_config
from diffusion_jax.models.checks import require
from diffusion_jax.models.dit import DiTConfig
from diffusion_jax.models.mmdit import MMDiTConfig
from diffusion_jax.types import Params

# A DiT whose blocks share one embedding has a class name of ours: diffusers has no such network.
DIT_CLASSES = ('DiTTransformer2DModel', 'DiT')
_DIT = {
  'dropout': 0.0, 'norm_num_groups': ANY, 'activation_fn': 'gelu-approximate',
  'upcast_attention': ANY, 'norm_type': 'ada_norm_zero', 'norm_elementwise_affine': False,
}

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


def read_dit(values: dict[str, Any], where: str) -> DiTConfig:
  """diffusers' DiTTransformer2DModel, or what `write_dit` wrote."""
  shared = values.get('_class_name') == 'DiT'
  values = {'out_channels': None} | values | {'shared_embedding': shared}
  return parse_config(DiTConfig, values, _DIT, where)


def write_dit(config: DiTConfig) -> dict[str, Any]:
  values = dataclasses.asdict(config)
  shared = values.pop('shared_embedding')
  return values | {'_class_name': DIT_CLASSES[shared], 'norm_type': 'ada_norm_zero'}


def read_mmdit(values: dict[str, Any], where: str) -> MMDiTConfig:
  """diffusers' SD3Transformer2DModel."""
  return parse_config(MMDiTConfig, values, {}, where)


def write_mmdit(config: MMDiTConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'SD3Transformer2DModel'}


def share_embedding(config: DiTConfig, params: Params) -> tuple[DiTConfig, Params]:
  """The same network with one embedding for all blocks, a ninth smaller for DiT-XL/2.

  UserError where the blocks' embeddings differ, as they may after training in diffusers.
  """
  kept = {}
  for name, value in params.items():
    first = _of_first_block(name)
    if first in (None, name):
      kept[name] = value
      continue
    require(np.array_equal(value, params[first]),
            f'{name} differs from {first}: the blocks of this DiT do not share an embedding.')
  return dataclasses.replace(config, shared_embedding=True), kept


def copy_embedding(config: DiTConfig, params: Params) -> tuple[DiTConfig, Params]:
  """The same network with an embedding in every block, as diffusers stores it."""
  copies = dict(params)
  for name, value in params.items():
    if _of_first_block(name) == name:
      end = name.removeprefix('transformer_blocks.0.')
      copies |= {f'transformer_blocks.{n}.{end}': value for n in range(config.num_layers)}
  return dataclasses.replace(config, shared_embedding=False), copies


def _of_first_block(name: str) -> str | None:
  """The first block's name of a parameter of an embedding; None for other parameters."""
  parts = name.split('.')
  if parts[0] != 'transformer_blocks' or parts[2:4] != ['norm1', 'emb']:
    return None
  return '.'.join([parts[0], '0', *parts[2:]])
