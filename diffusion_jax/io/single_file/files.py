"""Whole pipelines from and to one safetensors file in the names of CompVis and Stability."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.io.kinds import KINDS
from diffusion_jax.io.lora_keys import some
from diffusion_jax.io.pipeline_files import Part, Pipeline, check_part, lazy, typed
from diffusion_jax.io.single_file import autoencoder, families, text, unet
from diffusion_jax.io.single_file.extras import schedule_note, sort_out
from diffusion_jax.io.single_file.families import FAMILIES, LOW_RES_SCHEDULER
from diffusion_jax.io.single_file.rules import Rule, from_stored, to_stored
from diffusion_jax.io.tensors import (
  NewTensor,
  Tensor,
  metadata,
  open_tensors,
  read_json,
  write_tensors,
)
from diffusion_jax.links import inside
from diffusion_jax.models.checks import require

# The key of Stability's ModelSpec that tells epsilon from v-prediction.
_SPEC = 'modelspec.prediction_type'
_SPEC_VALUES = {'epsilon': 'epsilon', 'v': 'v_prediction', 'v_prediction': 'v_prediction'}
PREDICTIONS = ('epsilon', 'v_prediction')

_CLASSES = {'unet': 'UNet2DConditionModel', 'vae': 'AutoencoderKL'}


def _text_rules(style: str, config: Mapping[str, Any]) -> list[Rule]:
  projection = config.get('architectures') == ['CLIPTextModelWithProjection']
  make = text.clip_rules if style == 'clip' else text.open_clip_rules
  return make(config.get('num_hidden_layers', 12), projection)


def write_single_file(pipeline: Pipeline, path: Path, dtype: str | None) -> list[str]:
  """Writes U-Net, autoencoder and text encoders into one file; returns sentences on the rest.

  Raises:
    UserError: the file exists, or a part has no names in such a file.
  """
  require(not path.exists(), f'{path} is there already; give a new path.')
  configs = {
    name: _without_null(part.config or {}) for name, part in pipeline.parts.items() if part.kind
  }
  for part, config in configs.items():  # Within bounds, before it is counted along.
    KINDS[pipeline.parts[part].kind].read(config, f'{part}/config.json')
  name = families.of_parts(configs, 'The pipeline')
  family = FAMILIES[name]
  rules = {
    'unet': (unet.PREFIX, unet.rules(unet.of_config(configs['unet'], 'unet'))),
    'vae': (autoencoder.PREFIX, autoencoder.of_config(configs['vae'], 'vae')),
  }
  for encoder, (prefix, style) in family.text.items():
    rules[encoder] = (prefix, _text_rules(style, configs[encoder]))
  stored = {
    prefix + key: tensor
    for part, (prefix, table) in rules.items()
    for key, tensor in to_stored(table, pipeline.parts[part].tensors, part).items()
  }
  values = _scheduler_config(pipeline)
  prediction = values.get('prediction_type', 'epsilon')
  marks = {'v_pred': prediction == 'v_prediction', 'ztsnr': values.get('rescale_betas_zero_snr')}
  if name == 'sdxl':  # Empty tensors by which ComfyUI knows such models.
    empty = np.zeros((0,), np.float32)
    stored |= {key: NewTensor(empty.dtype, (0,), lambda: empty) for key, on in marks.items() if on}
  spec = {'epsilon': 'epsilon', 'v_prediction': 'v'}.get(prediction)
  write_tensors(path, typed(stored, dtype), {_SPEC: spec} if spec else None)
  return _left_out(pipeline, set(rules)) + _untold(name, configs, stored, prediction)


def _without_null(config: dict[str, Any]) -> dict[str, Any]:
  """Null stands for what is not said, but where it says that there is no middle."""
  return {k: v for k, v in config.items() if v is not None or k == 'mid_block_type'}


def _scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
  part, name = pipeline.parts.get('scheduler', Part(('', ''))), 'scheduler_config.json'
  files = [read_json(file) for file in part.files if file.name == name]
  return part.texts.get(name) or (files[0] if files else {})


def _left_out(pipeline: Pipeline, kept: set[str]) -> list[str]:
  plain = ('scheduler', 'low_res_scheduler', 'tokenizer', 'tokenizer_2')
  return [
    f'{name} is left out: a single file has no place for it.'
    for name in pipeline.parts if name not in kept and name not in plain
  ]


def _untold(family: str, configs: dict, stored: dict, prediction: str) -> list[str]:
  """Sentences on what those who read the file will take to be otherwise than it is."""
  read, notes = _configs(family, {k: t.shape for k, t in stored.items()}, prediction), []
  # What is not here follows from the shapes, or changes no output.
  keys = {
    'unet': ('attention_head_dim', 'norm_num_groups', 'norm_eps', 'freq_shift', 'flip_sin_to_cos'),
    'vae': ('norm_num_groups', 'scaling_factor'),
    'text_encoder': ('num_attention_heads', 'hidden_act', 'layer_norm_eps'),
  }
  keys['text_encoder_2'] = keys['text_encoder']
  for part, values in read.items():
    levels = len(values.get('block_out_channels', ()))
    each = lambda value, n=levels: [value] * n if isinstance(value, int) and n else value
    for key in keys[part]:
      has, will = configs[part].get(key, values[key]), values[key]
      if each(has) != each(will):
        notes.append(
          f'{part} has {key} {has!r}, which a single file does not tell; readers will take it to '
          f'be {will!r} unless they are given its config.'
        )
  return notes


def _configs(family: str, shapes: dict[str, tuple], prediction: str) -> dict[str, dict[str, Any]]:
  """config.json of each network of a single file, by its shapes and its family."""
  spec, where = FAMILIES[family], 'The file'
  size = spec.sample_sizes[prediction if prediction in PREDICTIONS else 'epsilon']
  of = lambda prefix: {
    name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)
  }
  configs = {}
  for encoder, (prefix, style) in spec.text.items():
    make = text.clip_config if style == 'clip' else text.open_clip_config
    configs[encoder] = make(of(prefix), f'{where} ({prefix})')
  pooled = configs.get('text_encoder_2', {}).get('projection_dim')
  of_unet = of(unet.PREFIX)
  structure = unet.of_shapes(of_unet, where, labels_are_sizes=family == 'sdxl')
  configs['unet'] = unet.config(structure, of_unet, where, heads=spec.heads, pooled=pooled)
  configs['unet'] |= {'sample_size': size}
  if family == 'sd2' and prediction == 'v_prediction':
    configs['unet']['upcast_attention'] = True  # Attention overflows float16, as published.
  configs['vae'] = autoencoder.config(of(autoencoder.PREFIX), where)
  factor = 2 ** (len(configs['vae']['block_out_channels']) - 1)
  configs['vae'] |= {'scaling_factor': spec.scaling_factor, 'sample_size': size * factor}
  if family == 'sdxl':
    configs['vae']['force_upcast'] = True
  return configs


def read_single_file(path: Path, prediction: str | None, tokenizers: Path | None) -> Pipeline:
  """The pipeline in a single file, with the configs that its shapes and its family tell.

  Args:
    prediction: 'epsilon' or 'v_prediction', where the file does not say it.
    tokenizers: a directory with the tokenizer's files, or with tokenizer/ and tokenizer_2/ in it.

  Raises:
    UserError: the file is broken, of no known family or holds another model beside, a tensor is
      missing, or the prediction or the tokenizers are not known.
  """
  opened = open_tensors(path)
  name = families.of_names(opened, str(path))
  renamed = {n: _stored_name(n) for n in opened}
  twice = [n for n, new in renamed.items() if new != n and new in opened]
  require(not twice, f'{path} holds {some(twice)} with and without text_model.; fetch it again.')
  kept, notes = sort_out(renamed.values(), name, str(path))
  stored = {renamed[n]: tensor for n, tensor in opened.items() if renamed[n] in kept}
  channels = _input_channels(opened, path)
  prediction = _prediction(name, channels, opened, path, prediction)
  try:
    configs = _configs(name, {key: tensor.shape for key, tensor in stored.items()}, prediction)
  except IndexError as error:
    raise UserError(f'{path} holds tensors with too few axes; fetch it again.') from error
  parts = {part: _part(part, configs[part], name) for part in configs}
  parts |= _schedulers(name, prediction, 'ztsnr' in opened) | _tokenizers(list(configs), tokenizers)
  _fill(parts, name, stored, str(path))
  scheduler = parts['scheduler'].texts['scheduler_config.json']
  notes += schedule_note(opened, scheduler, str(path))
  index: dict[str, Any] = {'_class_name': FAMILIES[name].pipelines[channels]}
  if name == 'sdxl':
    index['force_zeros_for_empty_prompt'] = True
  else:
    index |= {part: [None, None] for part in ('safety_checker', 'feature_extractor')}
  return Pipeline(index, parts, notes)


def _stored_name(name: str) -> str:
  """Some files leave CLIP's prefix out."""
  for prefix in ('cond_stage_model.transformer.', 'conditioner.embedders.0.transformer.'):
    inner = name.removeprefix(prefix)
    if inner != name and inner.startswith(('embeddings.', 'encoder.', 'final_layer_norm.')):
      return f'{prefix}text_model.{inner}'
  return name


def _input_channels(opened: Mapping[str, Tensor], path: Path) -> int:
  name = f'{unet.PREFIX}input_blocks.0.0.weight'
  require(name in opened and len(opened[name].shape) == 4, f'{path} lacks {name}; fetch it again.')
  return opened[name].shape[1]


def _prediction(
  family: str, channels: int, opened: Mapping[str, Tensor], path: Path, given: str | None
) -> str:
  require(
    channels in FAMILIES[family].pipelines,
    f'{path}: a U-Net of {family} with {channels} input channels is not known; '
    f'{", ".join(map(str, FAMILIES[family].pipelines))} are.',
  )
  said = _SPEC_VALUES.get(metadata(path).get(_SPEC, ''))
  if 'v_pred' in opened:
    said = 'v_prediction'
  found = given or said or FAMILIES[family].predictions.get(channels)
  require(
    found is not None,
    f'{path} does not say what its Stable Diffusion 2 predicts; give --prediction epsilon (trained '
    'at 512 pixels) or --prediction v_prediction (at 768).',
  )
  require(
    found in PREDICTIONS, f'--prediction is {found!r}; choose one of {", ".join(PREDICTIONS)}.'
  )
  return found


def _part(name: str, config: dict[str, Any], family: str) -> Part:
  if name in _CLASSES:
    kind = {'unet': 'unet', 'vae': 'autoencoder'}[name]
    return Part(('diffusers', _CLASSES[name]), kind, config)
  architecture = config['architectures'][0]
  kinds = {'CLIPTextModel': 'clip_text', 'CLIPTextModelWithProjection': 'clip_text_projection'}
  return Part(('transformers', architecture), kinds[architecture], config)


def _fill(parts: dict[str, Part], family: str, stored: dict[str, Tensor], where: str) -> None:
  """Gives the parts their tensors, each of which must fit its config."""
  prefixes = {'unet': unet.PREFIX, 'vae': autoencoder.PREFIX}
  prefixes |= {encoder: prefix for encoder, (prefix, _) in FAMILIES[family].text.items()}
  for part, prefix in prefixes.items():
    source = f'{where} ({prefix})'
    own = {
      name.removeprefix(prefix): lazy(tensor) for name, tensor in stored.items()
      if name.startswith(prefix)
    }
    parts[part].tensors = from_stored(
      _rules(part, family, parts[part].config, own, where), own, source
    )
    check_part(parts[part], source)


def _rules(part: str, family: str, config: dict, own: dict, where: str) -> list[Rule]:
  if part == 'unet':
    shapes = {name: tensor.shape for name, tensor in own.items()}
    return unet.rules(unet.of_shapes(shapes, where, labels_are_sizes=family == 'sdxl'))
  if part == 'vae':
    return autoencoder.of_config(config, where)
  return _text_rules(FAMILIES[family].text[part][1], config)


def _schedulers(family: str, prediction: str, zero_snr: bool) -> dict[str, Part]:
  found = {'scheduler': families.scheduler(family, prediction, zero_snr)}
  if family == 'x4_upscaler':
    found['low_res_scheduler'] = LOW_RES_SCHEDULER
  return {
    name: Part(('diffusers', kind), texts={
      'scheduler_config.json': values | {'_class_name': kind}
    }) for name, (kind, values) in found.items()
  }


def _tokenizers(configs: list[str], given: Path | None) -> dict[str, Part]:
  """The tokenizers that a single file does not hold."""
  wanted = [name.replace('text_encoder', 'tokenizer') for name in configs if 'text' in name]
  sentence = 'A single file holds no tokenizer; give --tokenizer DIR, a folder with '
  require(
    given is not None and given.is_dir(),
    sentence + ('vocab.json and merges.txt.' if len(wanted) == 1 else f'{" and ".join(wanted)}/.'),
  )
  parts = {}
  for name in wanted:
    folder = given / name if (given / name).is_dir() or len(wanted) > 1 else given
    files = [
      inside(folder / file, given) for file in (
        'vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json',
        'special_tokens_map.json', 'added_tokens.json',
      ) if (folder / file).is_file()
    ]
    has = {file.name for file in files}
    require(
      'tokenizer.json' in has or {'vocab.json', 'merges.txt'} <= has,
      f'--tokenizer {given}: {folder} holds no tokenizer.json, nor vocab.json and merges.txt.',
    )
    parts[name] = Part(('transformers', 'CLIPTokenizer'), files=files)
  return parts
