"""Pipelines from and to one safetensors file in the names of those who published them.

What a file of a transformer lacks, its text encoders or its autoencoder, is taken from a directory.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.diffusion.noise import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import inside
from diffusion_jax.formats.families import (
  FAMILIES,
  FLOW,
  LOW_RES_SCHEDULER,
  NONE,
  of_names,
  of_parts,
  scheduler,
  sort_out,
)
from diffusion_jax.formats.networks import CONFIG, Part, kind_of, read_part
from diffusion_jax.formats.pipeline import (
  CONVERSION,
  SCHEDULER,
  TEXT_CLASSES,
  TOKENIZER,
  Pipeline,
  typed,
)
from diffusion_jax.formats.published import published_name, some
from diffusion_jax.formats.scheduler_classes import CLASSES
from diffusion_jax.formats.single_file_names import (
  TEXT_STYLES,
  UNET,
  Rule,
  Shapes,
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
from diffusion_jax.formats.transformer_names import (
  TABLES,
  TRANSFORMER_CONFIGS,
  t5_config,
  transformer_rules,
)

# The key of Stability's ModelSpec that tells epsilon from v-prediction.
_SPEC = 'modelspec.prediction_type'
_SPEC_VALUES = {'epsilon': 'epsilon', 'v': 'v_prediction', 'v_prediction': 'v_prediction'}
PREDICTIONS = ('epsilon', 'v_prediction')


_RULES = {
  'unet': unet_rules, 'vae': autoencoder_rules, 't5': lambda names: [Rule((n,), n) for n in names],
} | {
  style: functools.partial(text_rules, style=style) for style in TEXT_STYLES
} | {kind: functools.partial(transformer_rules, kind=kind) for kind in TABLES}
"""Rules of a network's published names, by the style of those in a file."""


def rules_for(name: str, part: Part, style: str) -> list[Rule]:
  """UserError where a single file has no names for what its config describes."""
  names = {published_name(own) for own in part.format.shapes(part.config)}
  rules = _RULES[style](names)
  unknown = names.difference(*(rule.published for rule in rules))
  require(
    not unknown, f'{name}: a single file has no names for {some(unknown)}; convert to another '
    'layout.',
  )
  return rules


def write_single_file(pipeline: Pipeline, path: Path, dtype: str | None) -> list[str]:
  """Write denoiser, autoencoder and text encoders into one file; return sentences on the rest.

  UserError: the file exists, or a part has no names in such a file.
  """
  require(not path.exists(), f'{path} is there already; give a new path.')
  networks = {name: part for name, part in pipeline.parts.items() if part.kind}
  name = of_parts({part: one.values for part, one in networks.items()}, 'The pipeline')
  places = {part: place for part, place in FAMILIES[name].places.items() if part in networks}
  stored: dict[str, Tensor] = {}
  for part, (prefix, style) in places.items():
    new = to_stored(rules_for(part, networks[part], style), networks[part].tensors, part)
    stored |= {prefix + key: tensor for key, tensor in new.items()}
  values = pipeline.parts.get('scheduler', Part()).json(SCHEDULER)[0]
  flow = FLOW in FAMILIES[name].sample_sizes
  scheduler_class = CLASSES.get(values.get('_class_name'))
  require(
    flow or scheduler_class is None or scheduler_class.family not in ('flow', 'edm'),
    f'a single file cannot say that its network is sampled by {values.get("_class_name")}, so it '
    'would be read as one that predicts epsilon; convert to another layout.',
  )
  prediction = FLOW if flow else values.get('prediction_type', 'epsilon')
  notes = _left_out(pipeline, places) + _untold(name, networks, stored, prediction)
  notes += _unconverted(pipeline) + (_untold_steps(name, values) if flow else [])
  marks = {'v_pred': prediction == 'v_prediction', 'ztsnr': values.get('rescale_betas_zero_snr')}
  if FAMILIES[name].sizes:  # Empty tensors by which ComfyUI knows such models.
    empty = np.zeros((0,), np.float32)
    stored |= {key: Tensor(empty.dtype, (0,), lambda: empty) for key, on in marks.items() if on}
  spec = {'epsilon': 'epsilon', 'v_prediction': 'v'}.get(prediction)
  write_tensors(path, typed(stored, dtype), {_SPEC: spec} if spec else None)
  return notes


def _unconverted(pipeline: Pipeline) -> list[str]:
  """A sentence on what the model made of its network's prediction, if it did."""
  model = pipeline.index.get(CONVERSION) or {}
  own = model.get('network') or {}
  if all(model.get(name) == own.get(name) for name in ('prediction', 'noise')):
    return []
  return [
    f'{CONVERSION} is left out: a single file has no place for it; readers will see the network '
    f'alone, which predicts {shown(own.get("prediction"))} on the noise levels that it was made '
    f'for, and not {shown(model.get("prediction"))} on those that it was trained at last.'
  ]


def _left_out(pipeline: Pipeline, places: Iterable[str]) -> list[str]:
  silent = {*places, 'scheduler', 'low_res_scheduler', 'tokenizer', 'tokenizer_2', 'tokenizer_3'}
  return [
    f'{name} is left out: a single file has no place for it.'
    for name in pipeline.parts if name not in silent
  ]


_OF_CLIP = ('num_attention_heads', 'hidden_act', 'layer_norm_eps')
KEYS = {
  'unet': ('attention_head_dim', 'norm_num_groups', 'norm_eps', 'freq_shift', 'flip_sin_to_cos'),
  'vae': ('norm_num_groups', 'scaling_factor', 'shift_factor'),
  'mmdit': ('attention_head_dim',), 'flux': ('axes_dims_rope',),
  **dict.fromkeys(('pixart', 'dit'), ('attention_head_dim', 'num_attention_heads', 'norm_eps')),
  't5': ('relative_attention_max_distance', 'layer_norm_epsilon'),
} | dict.fromkeys(TEXT_STYLES, _OF_CLIP)
"""Keys that no shape in a single file determines, and that change an output, by style."""


def _untold(
  family: str, networks: dict[str, Part], stored: dict[str, Tensor], prediction: str
) -> list[str]:
  """Sentences on what those who read the file will take to be otherwise than it is."""
  places = FAMILIES[family].places
  configs = _configs(family, {k: t.shape for k, t in stored.items()}, prediction)
  return [
    note for name, values in configs.items()
    for note in untold(name, networks[name], values, KEYS[places[name][1]])
  ]


def untold(name: str, part: Part, values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
  """Sentences on a network that readers take to have the config.json `values`.

  UserError: it has other shapes with these.
  """
  own = {key: part.values[key] for key in keys if part.values.get(key) is not None}
  read = part_of({**values, **own})
  require(
    read.format.shapes(read.config) == part.format.shapes(part.config),
    f'{name}: a single file does not tell what its config says of its blocks; convert to another '
    'layout.',
  )
  levels = len(values.get('block_out_channels', ()))
  each = lambda value: [value] * levels if isinstance(value, int) and levels else value
  return [
    _untold_note(name, key, has, values.get(key)) + ' unless they are given its config.'
    for key, has in own.items() if each(has) != each(values.get(key))
  ]


def _untold_note(name: str, key: str, has: Any, taken: Any) -> str:
  return (
    f'{name} has {key} {has!r}, which a single file does not tell; readers will take it to be '
    f'{taken!r}'
  )


def _untold_steps(family: str, values: Mapping[str, Any]) -> list[str]:
  """Sentences on a scheduler that is not the one of its family."""
  usual = scheduler(family, FLOW, False)
  return [
    _untold_note('scheduler', key, values[key], usual[key]) + '.'
    for key in usual if key in values and values[key] != usual[key]
  ]


def _configs(family: str, shapes: Shapes, prediction: str) -> dict[str, dict[str, Any]]:
  """config.json of each network that a single file holds, by its shapes and its family."""
  spec, where = FAMILIES[family], 'The file'
  size = spec.sample_sizes.get(prediction) or spec.sample_sizes['epsilon']
  of = lambda prefix: {
    name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)
  }
  # Of a transformer's file parts may be apart.
  there = lambda prefix: spec.denoiser[0] == 'unet' or bool(of(prefix))
  configs = {
    encoder: _TEXT_CONFIGS[style](of(prefix), where=f'{where} ({prefix})')
    for encoder, (prefix, style) in spec.text.items() if there(prefix)
  }
  folder, style = spec.denoiser
  if style == 'unet':
    pooled = configs.get('text_encoder_2', {}).get('projection_dim')
    configs[folder] = unet_config(
      of(UNET), where, heads=spec.heads, pooled=pooled, sizes=spec.sizes
    ) | {'sample_size': size}
  else:
    configs[folder] = TRANSFORMER_CONFIGS[style](of(UNET), where)
  if family == 'sd2' and prediction == 'v_prediction':
    configs[folder]['upcast_attention'] = True  # Attention overflows float16, as published.
  if there(spec.vae):
    configs['vae'] = autoencoder_config(of(spec.vae), where)
    factor = 2 ** (len(configs['vae']['block_out_channels']) - 1)
    configs['vae'] |= {'scaling_factor': spec.scaling_factor, 'sample_size': size * factor}
    configs['vae'] |= spec.vae_values
  return configs


_TEXT_CONFIGS = {'t5': t5_config} | {
  style: functools.partial(text_config, style=style) for style in TEXT_STYLES
}


def read_single_file(path: Path, prediction: str | None, given: Path | None) -> Pipeline:
  """The pipeline in a single file, its configs by shapes and family.

  prediction: 'epsilon' or 'v_prediction', if not in the file. given: a directory with the files of
  the tokenizer, or with tokenizer/, tokenizer_2/ and what else the file lacks, such as
  text_encoder_2/. UserError: a broken file, no known family or another model, too, a missing tensor
  or part, or unknown prediction or tokenizers.
  """
  opened = open_tensors(path)
  name = of_names(opened, str(path))
  spec = FAMILIES[name]
  kept, notes, renamed = _sorted(opened, name, str(path))
  stored = {renamed[n]: tensor for n, tensor in opened.items() if renamed[n] in kept}
  channels = _input_channels(stored, spec.denoiser[1], path)
  prediction = _prediction(name, channels, opened, path, prediction)
  try:
    configs = _configs(name, {key: tensor.shape for key, tensor in stored.items()}, prediction)
  except (IndexError, ValueError) as error:
    raise UserError(f'{path} holds tensors with too few axes; fetch it again.') from error
  parts = {part: part_of(values) for part, values in configs.items()}
  more, absent = _apart(name, parts, given, str(path))
  tokenizers = _tokenizers(parts | more, given)
  _fill(parts, name, stored, str(path))
  parts |= more | _schedulers(name, prediction, 'ztsnr' in opened) | tokenizers
  scheduler = parts['scheduler'].texts[SCHEDULER]
  notes += _schedule_note(opened, scheduler, str(path))
  notes += [
    f'{role} is left out, which {path} lacks; to have it, give --tokenizer a folder with {role}/.'
    for role in absent
  ]
  index: dict[str, Any] = {'_class_name': spec.pipelines[channels], **spec.index}
  for role in absent:
    index |= {role: NONE, role.replace('text_encoder', 'tokenizer'): NONE}
  return Pipeline(index, parts, notes)


def _sorted(
  names: Iterable[str], family: str, where: str
) -> tuple[set[str], list[str], dict[str, str]]:
  """The names of the networks, sentences on others, and all names -> with the usual prefixes."""
  names, rename = set(names), FAMILIES[family].stored_name
  renamed = {name: rename(name) for name in names}
  twice = [name for name, new in renamed.items() if new != name and new in names]
  require(not twice, f'{where} holds {some(twice)} with and without {_prefix(twice, renamed)}; '
          'fetch it again.')
  return *sort_out(renamed.values(), family, where), renamed


def _prefix(names: list[str], renamed: Mapping[str, str]) -> str:
  """What the first of these names lacks."""
  if not names:
    return ''
  new = renamed[names[0]]
  return 'text_model.' if 'text_model.' in new else UNET if UNET in new else 'another prefix'


_KINDS = {
  'clip': ('clip_text',), 'clip_identity': ('clip_text_projection',),
  'clip_projection': ('clip_text_projection',), 't5': ('t5',), 'vae': ('autoencoder',),
}
"""Kinds of networks, by style."""


def _apart(
  family: str, parts: Mapping[str, Part], given: Path | None, where: str
) -> tuple[dict[str, Part], list[str]]:
  """The networks that a file lacks, from a directory, and the names of those left out."""
  spec, found, absent = FAMILIES[family], {}, []
  lacking = [name for name in spec.places if name not in parts]
  there = lambda name: given is not None and (given / name / CONFIG).is_file()
  needed = [name for name in lacking if name not in spec.optional]
  missing = [name for name in needed if not there(name)]
  require(
    not missing,
    f'{where} holds no {" and no ".join(missing)}; give --tokenizer DIR, a directory with '
    f'{", ".join(f"{name}/" for name in needed)} and the tokenizers, as in one of diffusers.',
  )
  for name in lacking:
    if not there(name):
      absent.append(name)
      continue
    kinds = _KINDS[spec.places[name][1]]
    part = read_part(inside(given / name, given)).expect(kinds)
    part.check(str(given / name))
    model = dict(t5='T5EncoderModel', autoencoder='AutoencoderKL').get(part.kind)
    model = model or part.values['architectures'][0]
    part.entry = 'diffusers' if part.kind == 'autoencoder' else 'transformers', model
    found[name] = part
  return found, absent


def _schedule_note(
  tensors: Mapping[str, Any], scheduler: Mapping[str, Any], where: str
) -> list[str]:
  """A sentence where a file's own table of noise is none of its family's, which is written."""
  table = tensors.get('alphas_cumprod')
  steps = scheduler['num_train_timesteps']
  if table is None or tuple(table.shape) != (steps,) or 'beta_schedule' not in scheduler:
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


_FIRST = {'unet': 'input_blocks.0.0.weight', 'mmdit': 'x_embedder.proj.weight',
          'flux': 'img_in.weight'}
"""The first layers: of a convolution or a matrix, inputs along the second axis."""


def _input_channels(stored: Mapping[str, Tensor], style: str, path: Path) -> int:
  name = UNET + _FIRST[style]
  axes = 2 if style == 'flux' else 4
  require(
    name in stored and len(stored[name].shape) == axes, f'{path} lacks {name}; fetch it again.'
  )
  return stored[name].shape[1]


def _prediction(
  family: str, channels: int, opened: Mapping[str, Tensor], path: Path, given: str | None
) -> str:
  require(
    channels in FAMILIES[family].pipelines,
    f'{path}: a denoiser of {family} with {channels} input channels is not known; '
    f'{", ".join(map(str, FAMILIES[family].pipelines))} are.',
  )
  if FLOW in FAMILIES[family].sample_sizes:
    require(
      given is None, f'--prediction is {given!r}, but a model of {family} predicts the flow; leave '
      'it out.',
    )
    return FLOW
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


def part_of(values: dict[str, Any]) -> Part:
  """A network by its config.json."""
  name = values.get('_class_name')
  entry = ('diffusers', name) if name else ('transformers', values['architectures'][0])
  return Part(entry, kind=kind_of(values), values=values)


def _fill(parts: dict[str, Part], family: str, stored: dict[str, Tensor], where: str) -> None:
  """Give the networks their tensors, each of which must fit its config."""
  for name, (prefix, style) in FAMILIES[family].places.items():
    if name not in parts:
      continue
    part, source = parts[name], f'{where} ({prefix})'
    own = {
      key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)
    }
    part.stored = from_stored(rules_for(name, part, style), own, source)
    part.check(source)


def _schedulers(family: str, prediction: str, zero_snr: bool) -> dict[str, Part]:
  found = {'scheduler': scheduler(family, prediction, zero_snr)}
  if family == 'x4_upscaler':
    found['low_res_scheduler'] = LOW_RES_SCHEDULER
  return {
    name: Part(('diffusers', values['_class_name']), texts={SCHEDULER: values})
    for name, values in found.items()
  }


def _tokenizers(parts: Mapping[str, Part], given: Path | None) -> dict[str, Part]:
  """Tokenizers of the text encoders, which a single file lacks."""
  wanted = {
    name.replace('text_encoder', 'tokenizer'): part.kind == 't5'
    for name, part in parts.items() if 'text' in name
  }
  sentence = 'A single file holds no tokenizer; give --tokenizer DIR, a folder with '
  require(
    given is not None and given.is_dir(),
    sentence + ('vocab.json and merges.txt.' if len(wanted) == 1 else f'{" and ".join(wanted)}/.'),
  )
  found = {}
  for name, t5 in wanted.items():
    folder = given / name if (given / name).is_dir() or len(wanted) > 1 else given
    files = [inside(folder / file, given) for file in TOKENIZER if (folder / file).is_file()]
    has = {file.name for file in files}
    require(
      'tokenizer.json' in has or ({'spiece.model'} if t5 else {'vocab.json', 'merges.txt'}) <= has,
      f'--tokenizer {given}: {folder} holds no tokenizer.json, nor '
      f'{"spiece.model" if t5 else "vocab.json and merges.txt"}.',
    )
    found[name] = Part(('transformers', TEXT_CLASSES['t5' if t5 else 'clip'][1]), files=files)
  return found
