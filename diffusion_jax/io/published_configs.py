"""Our configs <-> the config.json of diffusers and transformers.

Reading accepts a key that is not ours only with the values under which the published network
computes what ours does; anything else is an error that names the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_jax.models.autoencoder import AutoencoderKLConfig
from diffusion_jax.models.checks import require
from diffusion_jax.models.mlp import MLPConfig
from diffusion_jax.models.text.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion_jax.models.unet_config import UNetConfig

ANY = object()  # The key has no effect on the network.

_AUTOENCODER = {
  'act_fn': 'silu', 'use_quant_conv': True, 'use_post_quant_conv': True, 'force_upcast': ANY,
  'sample_size': ANY,
}
_UNET = {
  'act_fn': 'silu', 'center_input_sample': False, 'mid_block_type': 'UNetMidBlock2DCrossAttn',
  'only_cross_attention': False, 'downsample_padding': 1, 'mid_block_scale_factor': 1,
  'dropout': 0.0, 'dual_cross_attention': False, 'resnet_time_scale_shift': 'default',
  'resnet_skip_time_act': False, 'resnet_out_scale_factor': 1.0, 'conv_in_kernel': 3,
  'conv_out_kernel': 3, 'time_embedding_type': 'positional', 'attention_type': 'default',
  'class_embeddings_concat': False, 'addition_embed_type_num_heads': ANY,
  'upcast_attention': ANY,  # Our softmax is always in float32.
}
# What transformers writes into every config and what only text generation reads.
_GENERAL = dict.fromkeys((
  'architectures', 'attention_dropout', 'bad_words_ids', 'bos_token_id', 'chunk_size_feed_forward',
  'decoder_start_token_id', 'diversity_penalty', 'do_sample', 'dropout', 'dtype', 'early_stopping',
  'encoder_no_repeat_ngram_size', 'eos_token_id', 'exponential_decay_length_penalty',
  'finetuning_task', 'id2label', 'initializer_factor', 'initializer_range', 'label2id',
  'length_penalty', 'max_length', 'min_length', 'model_type', 'no_repeat_ngram_size',
  'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_attentions',
  'output_hidden_states', 'output_scores', 'pad_token_id', 'prefix', 'problem_type',
  'projection_dim', 'remove_invalid_values', 'repetition_penalty', 'return_dict',
  'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
  'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tie_word_embeddings',
  'tokenizer_class', 'top_k', 'top_p', 'torch_dtype', 'torchscript', 'transformers_version',
  'typical_p', 'use_bfloat16',
), ANY) | {'is_decoder': False, 'is_encoder_decoder': False, 'add_cross_attention': False,
           'pruned_heads': {}}


def _ours(cls: type, values: Mapping[str, Any], accepted: Mapping[str, Any], where: str) -> Any:
  """A `cls` from those of `values` that are its fields, after judging all the others."""
  fields = {field.name for field in dataclasses.fields(cls)}
  for key, value in values.items():
    if key in fields or key.startswith('_') or value is None:
      continue
    require(
      key in accepted and (accepted[key] is ANY or accepted[key] == value),
      f'{where}: {key}={value!r} is not implemented'
      + (f' (only {accepted[key]!r} is).' if key in accepted else '; such a model cannot be read.'),
    )
  return cls(**{key: value for key, value in values.items() if key in fields})


def read_autoencoder(values: dict[str, Any], where: str) -> AutoencoderKLConfig:
  """diffusers' AutoencoderKL."""
  # Defaults of diffusers that differ from ours.
  values = {'block_out_channels': [64], 'layers_per_block': 1} | values
  levels = len(values['block_out_channels'])
  kinds = {'down_block_types': 'DownEncoderBlock2D', 'up_block_types': 'UpDecoderBlock2D'}
  blocks = {key: [kind] * levels for key, kind in kinds.items()}
  values['shift_factor'] = values.get('shift_factor') or 0.0
  return _ours(AutoencoderKLConfig, values, _AUTOENCODER | blocks, where)


def write_autoencoder(config: AutoencoderKLConfig) -> dict[str, Any]:
  levels = len(config.block_out_channels)
  return dataclasses.asdict(config) | {
    '_class_name': 'AutoencoderKL',
    'act_fn': 'silu',
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
    'shift_factor': config.shift_factor or None,
  }


def read_unet(values: dict[str, Any], where: str) -> UNetConfig:
  """diffusers' UNet2DConditionModel."""
  values = {'sample_size': None, 'cross_attention_dim': 1280} | values
  return _ours(UNetConfig, values, _UNET, where)


def write_unet(config: UNetConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'UNet2DConditionModel', 'act_fn': 'silu'}


def read_clip_text(values: dict[str, Any], where: str) -> CLIPTextConfig:
  """transformers' CLIPTextModel; also the `text_config` of a whole CLIP."""
  return _ours(CLIPTextConfig, values, _GENERAL, where)


def write_clip_text(config: CLIPTextConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {
    'model_type': 'clip_text_model', 'architectures': ['CLIPTextModel'],
  }


def read_clip(values: dict[str, Any], where: str) -> CLIPConfig:
  """transformers' CLIPModel. Its old *_config_dict entries override the *_config ones."""
  towers = {}
  for name, cls in (('text_config', CLIPTextConfig), ('vision_config', CLIPVisionConfig)):
    tower = (values.get(name) or {}) | (values.get(f'{name}_dict') or {})
    towers[name] = _ours(cls, tower, _GENERAL, f'{where}, {name}')
  accepted = _GENERAL | {'text_config_dict': ANY, 'vision_config_dict': ANY}
  return _ours(CLIPConfig, values | towers, accepted, where)


def write_clip(config: CLIPConfig) -> dict[str, Any]:
  values = dataclasses.asdict(config) | {'model_type': 'clip', 'architectures': ['CLIPModel']}
  for tower in ('text', 'vision'):
    values[f'{tower}_config'] |= {
      'model_type': f'clip_{tower}_model', 'projection_dim': config.projection_dim
    }
  return values


def read_mlp(values: dict[str, Any], where: str) -> MLPConfig:
  """Our own; no other library has it."""
  return _ours(MLPConfig, values, {}, where)


def write_mlp(config: MLPConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'MLP'}
