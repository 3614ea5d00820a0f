"""config.json of the text and image encoders of transformers.

Configs of the text encoders that published diffusion models use.

Text encoders: transformers' CLIP names, which CompVis keeps, <-> those of OpenCLIP.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_jax.formats.published import ANY, parse_config
from diffusion_jax.formats.rules import Rule, same
from diffusion_jax.models.checks import require
from diffusion_jax.models.text.clip import (
  CLIPConfig,
  CLIPTextConfig,
  CLIPTextProjectionConfig,
  CLIPVisionConfig,
  CLIPVisionProjectionConfig,
)
from diffusion_jax.models.text.t5 import T5Config

# What transformers writes into every config and what only text generation reads.
GENERAL = dict.fromkeys((
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


def _tower(cls: type, model_type: str, architecture: str) -> tuple[Callable, Callable]:
  """Reads and writes the config.json of one tower of CLIP on its own."""

  def read(values: dict[str, Any], where: str) -> Any:
    return parse_config(cls, values, GENERAL, where)

  def write(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config) | {
      'model_type': model_type, 'architectures': [architecture]
    }

  return read, write


read_clip_text, write_clip_text = _tower(CLIPTextConfig, 'clip_text_model', 'CLIPTextModel')
read_clip_text_projection, write_clip_text_projection = _tower(
  CLIPTextProjectionConfig, 'clip_text_model', 'CLIPTextModelWithProjection'
)
read_clip_vision, write_clip_vision = _tower(
  CLIPVisionConfig, 'clip_vision_model', 'CLIPVisionModel'
)
read_clip_vision_projection, write_clip_vision_projection = _tower(
  CLIPVisionProjectionConfig, 'clip_vision_model', 'CLIPVisionModelWithProjection'
)


def read_clip(values: dict[str, Any], where: str) -> CLIPConfig:
  """transformers' CLIPModel. Its old *_config_dict entries override the *_config ones."""
  towers = {}
  for name, cls in (('text_config', CLIPTextConfig), ('vision_config', CLIPVisionConfig)):
    given = [values.get(key) or {} for key in (name, f'{name}_dict')]
    require(all(isinstance(g, dict) for g in given), f'{where}: {name} must be a JSON object.')
    tower = given[0] | given[1]
    towers[name] = parse_config(cls, tower, GENERAL, f'{where}, {name}')
  accepted = GENERAL | {'text_config_dict': ANY, 'vision_config_dict': ANY}
  return parse_config(CLIPConfig, values | towers, accepted, where)


def write_clip(config: CLIPConfig) -> dict[str, Any]:
  values = dataclasses.asdict(config) | {'model_type': 'clip', 'architectures': ['CLIPModel']}
  for tower in ('text', 'vision'):
    values[f'{tower}_config'] |= {
      'model_type': f'clip_{tower}_model', 'projection_dim': config.projection_dim
    }
  return values


# What only the decoder of T5 reads, and what follows from feed_forward_proj.
_T5 = GENERAL | dict.fromkeys((
  'classifier_dropout', 'dense_act_fn', 'dropout_rate', 'is_encoder_decoder', 'is_gated_act',
  'n_positions', 'num_decoder_layers', 'output_past', 'scale_decoder_outputs', 'use_cache',
), ANY)


def read_t5(values: dict[str, Any], where: str) -> T5Config:
  """transformers' T5EncoderModel, or any of its T5 models, of which the encoder is taken."""
  return parse_config(T5Config, values, _T5, where)


def write_t5(config: T5Config) -> dict[str, Any]:
  gated = config.feed_forward_proj == 'gated-gelu'
  return dataclasses.asdict(config) | {
    'model_type': 't5', 'architectures': ['T5EncoderModel'], 'is_encoder_decoder': False,
    'is_gated_act': gated, 'dense_act_fn': 'gelu_new' if gated else 'relu',
  }


TEXT_ENCODERS: dict[str, CLIPTextConfig | T5Config] = {
  # OpenAI's ViT-L/14: Stable Diffusion 1, and the first text encoder of XL.
  'clip_l': CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
  ),
  # OpenCLIP's ViT-H/14 without its last layer: Stable Diffusion 2.
  'openclip_h': CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act='gelu', eos_token_id=2,
  ),
  # OpenCLIP's ViT-bigG/14: the second text encoder of Stable Diffusion XL.
  'openclip_bigg': CLIPTextProjectionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    hidden_act='gelu', eos_token_id=2, projection_dim=1280,
  ),
  't5_v1_1_small': T5Config(
    d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj='gated-gelu'
  ),
  # Stable Diffusion 3, PixArt, Imagen.
  't5_v1_1_xxl': T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj='gated-gelu'
  ),
}


Shapes = Mapping[str, tuple[int, ...]]

_LAYER = {
  'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
  'self_attn.out_proj': 'attn.out_proj',
}
_LEAVES = ('weight', 'bias')


def clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """transformers' names, as they are."""
  tower = 'text_model'
  modules = [f'{tower}.final_layer_norm']
  for i in range(layers):
    modules += [
      f'{tower}.encoder.layers.{i}.{name}'
      for name in (*_LAYER, *(f'self_attn.{part}_proj' for part in 'qkv'))
    ]
  found = [rule for module in modules for rule in same(module, module)]
  tables = [f'{tower}.embeddings.{name}_embedding' for name in ('token', 'position')]
  for name in tables + ['text_projection'] * projection:
    found += same(name, name, ['weight'])
  return found


def open_clip_rules(layers: int, projection: bool = False) -> list[Rule]:
  """OpenCLIP's: queries, keys and values in one matrix, the projection as [in out]."""
  tower = 'text_model'
  found = [
    *same(f'{tower}.final_layer_norm', 'ln_final'),
    *same(f'{tower}.embeddings.token_embedding', 'token_embedding', ['weight']),
    Rule((f'{tower}.embeddings.position_embedding.weight',), 'positional_embedding'),
  ]
  if projection:
    found.append(Rule(('text_projection.weight',), 'text_projection', 'transposed'))
  for i in range(layers):
    ours, theirs = f'{tower}.encoder.layers.{i}', f'transformer.resblocks.{i}'
    for name, stored in _LAYER.items():
      found += same(f'{ours}.{name}', f'{theirs}.{stored}')
    for leaf in _LEAVES:
      parts = tuple(f'{ours}.self_attn.{part}_proj.{leaf}' for part in 'qkv')
      found.append(Rule(parts, f'{theirs}.attn.in_proj_{leaf}', 'stacked'))
  return found


def clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in transformers' names, of CLIP ViT-L's kind."""
  tower = 'text_model'
  return _config(
    where, shapes.get(f'{tower}.embeddings.token_embedding.weight'),
    shapes.get(f'{tower}.embeddings.position_embedding.weight'),
    shapes.get(f'{tower}.encoder.layers.0.mlp.fc1.weight'),
    _count(r'text_model\.encoder\.layers\.(\d{1,4})\.', shapes), 'quick_gelu', None,
  )


def open_clip_config(shapes: Shapes, where: str) -> dict[str, Any]:
  """config.json by tensors in OpenCLIP's names, with a projection where they have one."""
  return _config(
    where, shapes.get('token_embedding.weight'), shapes.get('positional_embedding'),
    shapes.get('transformer.resblocks.0.mlp.c_fc.weight'),
    _count(r'transformer\.resblocks\.(\d{1,4})\.', shapes), 'gelu', shapes.get('text_projection'),
  )


def _config(where, tokens, positions, wide, layers, act, projection) -> dict[str, Any]:
  require(
    tokens is not None and positions is not None and wide is not None,
    f'{where} holds no whole text encoder; give a whole model.',
  )
  width = tokens[1]
  architecture = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return {
    'architectures': [architecture], 'model_type': 'clip_text_model', 'hidden_act': act,
    'vocab_size': tokens[0], 'hidden_size': width, 'intermediate_size': wide[0],
    'num_hidden_layers': layers, 'num_attention_heads': max(1, width // 64),
    'max_position_embeddings': positions[0], 'layer_norm_eps': 1e-5,
    'projection_dim': projection[1] if projection else width,
    # As published: 2 means pooling at the largest id, which is the end of the text.
    'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1,
  }


def _count(pattern: str, shapes: Shapes) -> int:
  found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
  return max(found, default=-1) + 1
