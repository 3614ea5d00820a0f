"""Whole pipelines from and to one safetensors file in the names of CompVis and Stability.

A tensor that no network of the file's family has is harmless where nothing would have been computed
with it: a head of a text encoder, a table, an average, what an optimizer or another program left.
Such are left and named. Where it makes the file another model than its family's, it is refused.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError, require
from diffusion_jax.files import inside
from diffusion_jax.formats import autoencoder, clip, unet
from diffusion_jax.formats.adapter_names import is_lora, of_other_kinds, some
from diffusion_jax.formats.families import (
  FAMILIES,
  LOW_RES_SCHEDULER,
  ignored,
  of_names,
  of_parts,
  scheduler,
)
from diffusion_jax.formats.networks import network_format
from diffusion_jax.formats.pipeline import (
  SCHEDULER,
  TOKENIZER,
  Part,
  Pipeline,
  check_part,
  lazy,
  typed,
)
from diffusion_jax.formats.published import Rule, from_stored, to_stored
from diffusion_jax.formats.tensors import NewTensor, Tensor, metadata, open_tensors, write_tensors

_GROUPS = {
  'depth_model.': 'the depth estimator', 'model_ema.': 'averages of the weights',
  'safety_checker.': 'the safety checker',
}
_TOWERS = {
  'clip': ('text_model.',),
  'open_clip': (
    'token_embedding', 'positional_embedding', 'transformer.', 'ln_final', 'text_projection'
  ),
}
"""How the parts of a text encoder begin that a pipeline calls, by the style of its names."""
_OF_AUTOENCODER = ('encoder.', 'decoder.', 'quant_conv.', 'post_quant_conv.', 'quantize.', 'bn.')
_HEADS = re.compile(r'(^|[._])(logit_scale|logit_bias|text_projection|visual|vision_model)\b')
_MODELS = {
  'a ControlNet': re.compile(r'^(control_model|controlnet)\.|^lora_controlnet$|input_hint_block'),
  'the parts of unCLIP': re.compile(r'^(embedder|noise_augmentor)\.'),
  'the parts of a later model': re.compile(
    r'^text_encoders\.|(^|\.)(joint_blocks|double_blocks|single_blocks|x_embedder|context_embedder|'
    r'transformer_blocks\.\d+\.norm1_context)\.'
  ),
  'a model in the names of diffusers': re.compile(r'^(unet|vae|text_encoder|text_encoder_2)\.'),
  'another text encoder': re.compile(r'^(cond_stage_model|conditioner)\.'),
}


def sort_out(names: Iterable[str], family: str, where: str) -> tuple[set[str], list[str]]:
  """The names of the networks of a family, and a sentence on what is left, where anything is.

  Raises:
    UserError: a LoRA, a ControlNet or parts of another model, which cannot be left.
  """
  kept: set[str] = set()
  rest: list[str] = []
  for name in names:
    if ignored(name):
      continue
    if _has(name, family):
      kept.add(name)
    else:
      rest.append(name)
  _refuse(rest, where)
  return kept, _note(rest, where)


def _has(name: str, family: str) -> bool:
  """Return whether a tensor is where a family has its networks; they may still not have it."""
  if name.startswith(unet.PREFIX):
    return True
  if name.startswith(autoencoder.PREFIX):
    return name.removeprefix(autoencoder.PREFIX).startswith(_OF_AUTOENCODER)
  return any(
    name.removeprefix(prefix).startswith(_TOWERS[style])
    for prefix, style in FAMILIES[family].text.values() if name.startswith(prefix)
  )


def _refuse(rest: list[str], where: str) -> None:
  of_models: Mapping[str, list[str]] = {
    'a LoRA': [name for name in rest if is_lora(name)], **of_other_kinds(rest),
    **{
      kind: [n for n in rest if pattern.search(n) and not _HEADS.search(n)]
      for kind, pattern in _MODELS.items()
    },
  }
  for kind, found in of_models.items():
    require(
      not found,
      f'{where} holds {kind} ({some(found)}), without which it would be another model; convert a '
      'file without.',
    )


def _note(rest: list[str], where: str) -> list[str]:
  if not rest:
    return []
  parts, counted = [], 0
  for prefix, what in _GROUPS.items():
    if count := sum(name.startswith(prefix) for name in rest):
      parts.append(f'{what} ({prefix}, {count} tensors)')
      counted += count
  others = [name for name in rest if not name.startswith(tuple(_GROUPS))]
  if others:
    parts.append(f'{len(others)} tensors that no network of it has ({some(others)})')
  return [f'{where}: left out are {", ".join(parts)}.']


def schedule_note(
  tensors: Mapping[str, Any], scheduler: Mapping[str, Any], where: str
) -> list[str]:
  """A sentence where a file's own table of noise is none of its family's, which is written."""
  table = tensors.get('alphas_cumprod')
  steps = scheduler['num_train_timesteps']
  if table is None or tuple(table.shape) != (steps,):
    return []
  known = [
    Schedule(ScheduleConfig(
      scheduler['beta_schedule'], scheduler['beta_start'], scheduler['beta_end'], steps, zero
    )).alpha_bar for zero in (False, True)
  ]
  found = np.asarray(table, np.float64)
  if any(np.abs(found - one).max() < 1e-2 for one in known):  # Half precision is off by 5e-4.
    return []
  return [
    f'{where}: its alphas_cumprod is another noise schedule than scheduler_config.json now says, '
    'which is that of its family; correct beta_start, beta_end or beta_schedule there.'
  ]


# The key of Stability's ModelSpec that tells epsilon from v-prediction.
_SPEC = 'modelspec.prediction_type'
_SPEC_VALUES = {'epsilon': 'epsilon', 'v': 'v_prediction', 'v_prediction': 'v_prediction'}
PREDICTIONS = ('epsilon', 'v_prediction')

_CLASSES = {'unet': 'UNet2DConditionModel', 'vae': 'AutoencoderKL'}


def _text_rules(style: str, config: Mapping[str, Any]) -> list[Rule]:
  projection = config.get('architectures') == ['CLIPTextModelWithProjection']
  make = clip.clip_rules if style == 'clip' else clip.open_clip_rules
  return make(config.get('num_hidden_layers', 12), projection)


def write_single_file(pipeline: Pipeline, path: Path, dtype: str | None) -> list[str]:
  """Write U-Net, autoencoder and text encoders into one file; returns sentences on the rest.

  Raises:
    UserError: the file exists, or a part has no names in such a file.
  """
  require(not path.exists(), f'{path} is there already; give a new path.')
  configs = {name: _without_null(part.values) for name, part in pipeline.parts.items() if part.kind}
  for part, config in configs.items():  # Within bounds, before it is counted along.
    network_format(pipeline.parts[part].kind).parse(config, f'{part}/config.json')
  name = of_parts(configs, 'The pipeline')
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
  values = pipeline.parts.get('scheduler', Part()).json(SCHEDULER)[0]
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
    make = clip.clip_config if style == 'clip' else clip.open_clip_config
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
  name = of_names(opened, str(path))
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
  scheduler = parts['scheduler'].texts[SCHEDULER]
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
    return Part(('diffusers', _CLASSES[name]), kind=kind, values=config)
  architecture = config['architectures'][0]
  kinds = {'CLIPTextModel': 'clip_text', 'CLIPTextModelWithProjection': 'clip_text_projection'}
  return Part(('transformers', architecture), kind=kinds[architecture], values=config)


def _fill(parts: dict[str, Part], family: str, stored: dict[str, Tensor], where: str) -> None:
  """Give the parts their tensors, each of which must fit its config."""
  prefixes = {'unet': unet.PREFIX, 'vae': autoencoder.PREFIX}
  prefixes |= {encoder: prefix for encoder, (prefix, _) in FAMILIES[family].text.items()}
  for part, prefix in prefixes.items():
    source = f'{where} ({prefix})'
    own = {
      name.removeprefix(prefix): lazy(tensor) for name, tensor in stored.items()
      if name.startswith(prefix)
    }
    parts[part].stored = from_stored(
      _rules(part, family, parts[part].values, own, where), own, source
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
  found = {'scheduler': scheduler(family, prediction, zero_snr)}
  if family == 'x4_upscaler':
    found['low_res_scheduler'] = LOW_RES_SCHEDULER
  return {
    name: Part(('diffusers', kind), texts={SCHEDULER: values | {'_class_name': kind}})
    for name, (kind, values) in found.items()
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
    files = [inside(folder / file, given) for file in TOKENIZER if (folder / file).is_file()]
    has = {file.name for file in files}
    require(
      'tokenizer.json' in has or {'vocab.json', 'merges.txt'} <= has,
      f'--tokenizer {given}: {folder} holds no tokenizer.json, nor vocab.json and merges.txt.',
    )
    parts[name] = Part(('transformers', 'CLIPTokenizer'), files=files)
  return parts
