"""Whole pipelines from and to one safetensors file in the names of CompVis and Stability."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError, require
from diffusion_jax.files import inside
from diffusion_jax.formats.families import (
  FAMILIES,
  LOW_RES_SCHEDULER,
  of_names,
  of_parts,
  scheduler,
  sort_out,
)
from diffusion_jax.formats.networks import Part, kind_of
from diffusion_jax.formats.pipeline import SCHEDULER, TOKENIZER, Pipeline, typed
from diffusion_jax.formats.published import published_name, some
from diffusion_jax.formats.single_file_names import (
  AUTOENCODER,
  UNET,
  Rule,
  autoencoder_config,
  autoencoder_rules,
  from_stored,
  text_config,
  text_rules,
  to_stored,
  unet_config,
  unet_rules,
)
from diffusion_jax.formats.tensors import Tensor, metadata, open_tensors, write_tensors

# The key of Stability's ModelSpec that tells epsilon from v-prediction.
_SPEC = 'modelspec.prediction_type'
_SPEC_VALUES = {'epsilon': 'epsilon', 'v': 'v_prediction', 'v_prediction': 'v_prediction'}
PREDICTIONS = ('epsilon', 'v_prediction')


def _rules(name: str, part: Part, style: str) -> list[Rule]:
  """UserError where a single file has no names for what its config describes."""
  names = {published_name(own) for own in part.format.shapes(part.config)}
  makers = {'unet': unet_rules, 'vae': autoencoder_rules}
  rules = makers[style](names) if style in makers else text_rules(names, style)
  unknown = names.difference(*(rule.published for rule in rules))
  require(
    not unknown, f'{name}: a single file has no names for {some(unknown)}; convert to another '
    'layout.',
  )
  return rules


def write_single_file(pipeline: Pipeline, path: Path, dtype: str | None) -> list[str]:
  """Write U-Net, autoencoder and text encoders into one file; return sentences on the rest.

  UserError: the file exists, or a part has no names in such a file.
  """
  require(not path.exists(), f'{path} is there already; give a new path.')
  networks = {name: part for name, part in pipeline.parts.items() if part.kind}
  name = of_parts({part: one.values for part, one in networks.items()}, 'The pipeline')
  places = FAMILIES[name].places
  stored: dict[str, Tensor] = {}
  for part, (prefix, style) in places.items():
    new = to_stored(_rules(part, networks[part], style), networks[part].tensors, part)
    stored |= {prefix + key: tensor for key, tensor in new.items()}
  values = pipeline.parts.get('scheduler', Part()).json(SCHEDULER)[0]
  prediction = values.get('prediction_type', 'epsilon')
  notes = _left_out(pipeline, places) + _untold(name, networks, stored, prediction)
  marks = {'v_pred': prediction == 'v_prediction', 'ztsnr': values.get('rescale_betas_zero_snr')}
  if FAMILIES[name].sizes:  # Empty tensors by which ComfyUI knows such models.
    empty = np.zeros((0,), np.float32)
    stored |= {key: Tensor(empty.dtype, (0,), lambda: empty) for key, on in marks.items() if on}
  spec = {'epsilon': 'epsilon', 'v_prediction': 'v'}.get(prediction)
  write_tensors(path, typed(stored, dtype), {_SPEC: spec} if spec else None)
  return notes


def _left_out(pipeline: Pipeline, places: Iterable[str]) -> list[str]:
  silent = {*places, 'scheduler', 'low_res_scheduler', 'tokenizer', 'tokenizer_2'}
  return [
    f'{name} is left out: a single file has no place for it.'
    for name in pipeline.parts if name not in silent
  ]


_TEXT_KEYS = ('num_attention_heads', 'hidden_act', 'layer_norm_eps')
_KEYS = {
  'unet': ('attention_head_dim', 'norm_num_groups', 'norm_eps', 'freq_shift', 'flip_sin_to_cos'),
  'vae': ('norm_num_groups', 'scaling_factor'),
  'text_encoder': _TEXT_KEYS, 'text_encoder_2': _TEXT_KEYS,
}
"""Keys that no shape in a single file determines, and that change an output."""


def _untold(
  family: str, networks: dict[str, Part], stored: dict[str, Tensor], prediction: str
) -> list[str]:
  """Sentences on what those who read the file will take to be otherwise than it is."""
  notes = []
  for name, values in _configs(family, {k: t.shape for k, t in stored.items()}, prediction).items():
    part = networks[name]
    own = {key: part.values[key] for key in _KEYS[name] if part.values.get(key) is not None}
    read = _part(values | own)
    require(
      read.format.shapes(read.config) == part.format.shapes(part.config),
      f'{name}: a single file does not tell what its config says of its blocks; convert to another '
      'layout.',
    )
    levels = len(values.get('block_out_channels', ()))
    each = lambda value, n=levels: [value] * n if isinstance(value, int) and n else value
    notes += [
      f'{name} has {key} {has!r}, which a single file does not tell; readers will take it to be '
      f'{values[key]!r} unless they are given its config.'
      for key, has in own.items() if each(has) != each(values[key])
    ]
  return notes


def _configs(family: str, shapes: dict[str, tuple], prediction: str) -> dict[str, dict[str, Any]]:
  """config.json of each network of a single file, by its shapes and its family."""
  spec, where = FAMILIES[family], 'The file'
  size = spec.sample_sizes[prediction if prediction in PREDICTIONS else 'epsilon']
  of = lambda prefix: {
    name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)
  }
  configs = {
    encoder: text_config(of(prefix), style, f'{where} ({prefix})')
    for encoder, (prefix, style) in spec.text.items()
  }
  pooled = configs.get('text_encoder_2', {}).get('projection_dim')
  configs['unet'] = unet_config(of(UNET), where, heads=spec.heads, pooled=pooled, sizes=spec.sizes)
  configs['unet'] |= {'sample_size': size}
  if family == 'sd2' and prediction == 'v_prediction':
    configs['unet']['upcast_attention'] = True  # Attention overflows float16, as published.
  configs['vae'] = autoencoder_config(of(AUTOENCODER), where)
  factor = 2 ** (len(configs['vae']['block_out_channels']) - 1)
  configs['vae'] |= {'scaling_factor': spec.scaling_factor, 'sample_size': size * factor}
  if spec.sizes:
    configs['vae']['force_upcast'] = True
  return configs


def read_single_file(path: Path, prediction: str | None, tokenizers: Path | None) -> Pipeline:
  """The pipeline in a single file, its configs by shapes and family.

  prediction: 'epsilon' or 'v_prediction', if not in the file. tokenizers: a directory with the
  files, or with tokenizer/ and tokenizer_2/. UserError: a broken file, no known family or another
  model, too, a missing tensor, or unknown prediction or tokenizers.
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
  parts = {part: _part(values) for part, values in configs.items()}
  parts |= _schedulers(name, prediction, 'ztsnr' in opened) | _tokenizers(list(configs), tokenizers)
  _fill(parts, name, stored, str(path))
  scheduler = parts['scheduler'].texts[SCHEDULER]
  notes += _schedule_note(opened, scheduler, str(path))
  index = {'_class_name': FAMILIES[name].pipelines[channels], **FAMILIES[name].index}
  return Pipeline(index, parts, notes)


def _schedule_note(
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


def _stored_name(name: str) -> str:
  """Some files leave CLIP's prefix out."""
  for prefix in ('cond_stage_model.transformer.', 'conditioner.embedders.0.transformer.'):
    inner = name.removeprefix(prefix)
    if inner != name and inner.startswith(('embeddings.', 'encoder.', 'final_layer_norm.')):
      return f'{prefix}text_model.{inner}'
  return name


def _input_channels(opened: Mapping[str, Tensor], path: Path) -> int:
  name = f'{UNET}input_blocks.0.0.weight'
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


def _part(values: dict[str, Any]) -> Part:
  """A network by its config.json."""
  name = values.get('_class_name')
  entry = ('diffusers', name) if name else ('transformers', values['architectures'][0])
  return Part(entry, kind=kind_of(values), values=values)


def _fill(parts: dict[str, Part], family: str, stored: dict[str, Tensor], where: str) -> None:
  """Give the networks their tensors, each of which must fit its config."""
  for name, (prefix, style) in FAMILIES[family].places.items():
    part, source = parts[name], f'{where} ({prefix})'
    own = {
      key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)
    }
    part.stored = from_stored(_rules(name, part, style), own, source)
    part.check(source)


def _schedulers(family: str, prediction: str, zero_snr: bool) -> dict[str, Part]:
  found = {'scheduler': scheduler(family, prediction, zero_snr)}
  if family == 'x4_upscaler':
    found['low_res_scheduler'] = LOW_RES_SCHEDULER
  return {
    name: Part(('diffusers', values['_class_name']), texts={SCHEDULER: values})
    for name, values in found.items()
  }


def _tokenizers(configs: list[str], given: Path | None) -> dict[str, Part]:
  """Tokenizers, which a single file lacks."""
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
