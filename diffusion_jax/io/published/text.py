"""config.json of the text and image encoders of transformers."""

import dataclasses
from collections.abc import Callable
from typing import Any

from diffusion_jax.io.published.common import ANY, ours
from diffusion_jax.models.checks import require
from diffusion_jax.models.text.clip_config import (
  CLIPConfig,
  CLIPTextConfig,
  CLIPTextProjectionConfig,
  CLIPVisionConfig,
  CLIPVisionProjectionConfig,
)
from diffusion_jax.models.text.t5_config import T5Config

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
    return ours(cls, values, GENERAL, where)

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
    towers[name] = ours(cls, tower, GENERAL, f'{where}, {name}')
  accepted = GENERAL | {'text_config_dict': ANY, 'vision_config_dict': ANY}
  return ours(CLIPConfig, values | towers, accepted, where)


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
  return ours(T5Config, values, _T5, where)


def write_t5(config: T5Config) -> dict[str, Any]:
  gated = config.feed_forward_proj == 'gated-gelu'
  return dataclasses.asdict(config) | {
    'model_type': 't5', 'architectures': ['T5EncoderModel'], 'is_encoder_decoder': False,
    'is_gated_act': gated, 'dense_act_fn': 'gelu_new' if gated else 'relu',
  }
