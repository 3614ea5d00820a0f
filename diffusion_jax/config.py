"""Configs: nested dictionaries to frozen dataclasses, and the sections of a training.

`typed` holds a config against the types of a dataclass: every key is known, of the right type and
within its limits (see `limits`). What cannot be said by a type is checked where it is used.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from diffusion_jax.errors import UserError
from diffusion_jax.limits import ByType, Count, Help, OneOf, Positive, Range, Seconds, Seed
from diffusion_jax.registry import OPTIMIZERS, SAMPLERS, TASKS, check, load

T = TypeVar('T')


def typed(cls: type[T], values: Mapping[str, Any], where: str = 'config.') -> T:
  """Return the dataclass `cls` with these values, section by section.

  Every key must be a field, so no key can be without effect; fields without default must be given.
  A field may be a scalar, a Literal, a tuple, a dictionary, a dataclass, a union, of which a
  section chooses the dataclass by its key `type`, or one of these `Annotated` with limits.

  Args:
    where: what stands before the keys in an error.

  Raises:
    UserError: unknown key (with the nearest known one), missing key, wrong type or value.
  """
  if not isinstance(values, Mapping):
    raise UserError(f'{where.rstrip(".")} is {values!r:.80}; it must be a section of keys.')
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      hint = f'did you mean {where}{close[0]}?' if close else f'known: {", ".join(fields)}.'
      raise UserError(f'{where}{key} is not a known key; {hint}')
  for name, field in fields.items():
    no_default = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
    if name not in values and no_default:
      raise UserError(f'{where}{name} is missing; set it.')
  return cls(**{k: _convert(hints[k], value, f'{where}{k}') for k, value in values.items()})


def untyped(value: Any) -> Any:
  """Return dataclasses as dictionaries that `typed` reads back, as JSON would have them."""
  if not dataclasses.is_dataclass(value):
    if isinstance(value, Mapping):
      return {key: untyped(item) for key, item in value.items()}
    return [untyped(item) for item in value] if isinstance(value, (tuple, list)) else value
  hints = typing.get_type_hints(type(value), include_extras=True)
  found = {}
  for field in dataclasses.fields(value):
    section = getattr(value, field.name)
    by_type = (m for m in getattr(hints[field.name], '__metadata__', ()) if isinstance(m, ByType))
    name = next((kind.name(section) for kind in by_type), '')
    found[field.name] = untyped(section)
    if name and isinstance(found[field.name], dict):
      found[field.name] = {'type': name} | found[field.name]
  return json.loads(json.dumps(found))


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dictionaries -> one dictionary with dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _convert(hint: Any, value: Any, where: str) -> Any:
  origin = typing.get_origin(hint)
  if hint is Any:
    return value
  if origin is Annotated:
    return _limited(*typing.get_args(hint), value=value, where=where)
  if origin is Literal:
    if value not in typing.get_args(hint) or isinstance(value, bool):
      check(typing.get_args(hint), value, where)
    return value
  if dataclasses.is_dataclass(hint):
    return typed(hint, value, f'{where}.')
  if origin in (typing.Union, types.UnionType):
    return _one_of(typing.get_args(hint), hint, value, where)
  if origin is dict:
    if not isinstance(value, Mapping):
      raise _wrong(hint, value, where)
    of_value = typing.get_args(hint)[1]
    return {key: _convert(of_value, item, f'{where}.{key}') for key, item in value.items()}
  if hint is tuple or origin is tuple:
    return _tuple(hint, value, where)
  return _scalar(hint, value, where)


def _limited(hint: Any, *limits: Any, value: Any, where: str) -> Any:
  for limit in limits:
    if isinstance(limit, ByType) and isinstance(value, Mapping):
      rest = {key: item for key, item in value.items() if key != 'type'}
      return typed(limit.section(value.get('type', limit.default), where), rest, f'{where}.')
  converted = _convert(hint, value, where)
  for limit in limits:
    if isinstance(limit, (Range, OneOf)):
      limit.check(converted, where)
  return converted


def _one_of(choices: tuple, hint: Any, value: Any, where: str) -> Any:
  """The value as the first of a union's choices that it fits."""
  sections = [choice for choice in choices if dataclasses.is_dataclass(choice)]
  if isinstance(value, Mapping) and sections:
    names = {_type_of(choice): choice for choice in sections}
    chosen = names.get(check(names, value['type'], f'{where}.type')) if 'type' in value else None
    return typed(chosen or sections[0], value, f'{where}.')
  for choice in choices:
    try:
      return _convert(choice, value, where)
    except UserError:
      continue
  raise _wrong(hint, value, where)


def _type_of(section: type) -> str:
  """The one value of a dataclass's field `type`."""
  return typing.get_args(typing.get_type_hints(section).get('type', Literal['']))[0]


def _tuple(hint: Any, value: Any, where: str) -> tuple:
  if not isinstance(value, (tuple, list)):
    raise _wrong(hint, value, where)
  arguments = typing.get_args(hint)
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    arguments = (arguments[0],) * len(value)
  if arguments and len(arguments) != len(value):
    raise _wrong(hint, value, where)
  items = zip(arguments or (Any,) * len(value), value, strict=True)
  return tuple(_convert(each, item, f'{where}[{i}]') for i, (each, item) in enumerate(items))


def _scalar(hint: Any, value: Any, where: str) -> Any:
  if hint in (type(None), None) and value is None:
    return None
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  # bool is an int in Python, but a switch is no number.
  if hint in (int, float, str, bool) and type(value) is hint:
    return value
  raise _wrong(hint, value, where)


def _wrong(hint: Any, value: Any, where: str) -> UserError:
  name = str(hint) if typing.get_origin(hint) else getattr(hint, '__name__', str(hint))
  return UserError(f'{where} is {value!r:.80}, a {type(value).__name__}; it must be {name}.')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """dataset: a name of `SOURCES`, some with more after a colon, such as 'folder:PATH' of pictures,
  for a classifier in folders by class; size: edge of the images in pixels, or points in a record;
  prepare: make it if missing; caption: of every picture of a folder that has none of its own, or
  several, one a line; test_fraction: of the pictures of a folder without folders train and test,
  left to the test split, 0 to train on all; caption_column: the one column of captions in its
  metadata.jsonl or metadata.csv, '' for all of `captions.CAPTIONS`.

  transforms: (name, arguments) pairs in order, applied to every training image; workers: threads
  that read and transform, in each process; 0 does it between the steps; most_unreadable: fraction
  of the records of a split that may be damaged, which are named and replaced by others; with more
  the run ends.
  """

  dataset: str
  size: int
  data_dir: str = ''
  prepare: bool = True
  caption: str = ''
  caption_column: str = ''
  test_fraction: Annotated[float, Range(
    0, 1, below=True, text='a fraction from 0, which trains on all, to below 1'
  )] = 0.1
  transforms: tuple = ()
  workers: Annotated[int, Range(0, text='a number of threads, or 0')] = 2
  most_unreadable: Annotated[float, Range(0, 1, text='a fraction of the records, 0 to 1')] = 0.5


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """name: of `OPTIMIZERS`. learning_rate: peak. schedule: from the end of the warm-up to the last
  step, ending at final_fraction of the peak. b1, b2, eps, weight_decay: of those that have them.
  clip_norm: largest global gradient norm, 0 for none. groups: (regular expression over parameter
  names, factor on the learning rate); the first that matches counts, factor 0 freezes, no match
  means 1. options: more arguments of the optimizer.
  """

  name: Annotated[str, OneOf(OPTIMIZERS)] = 'adamw'
  learning_rate: float = 1e-4
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  warmup_steps: Count = 0
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: Annotated[float, Range(0)] = 1.0
  groups: tuple[tuple[str, float], ...] = ()
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.options:  # Else nothing is imported.
      try:
        load(OPTIMIZERS, self.name, 'optimizer.name')(self, lambda n: 0.0, {})
      except TypeError as error:
        raise UserError(f'optimizer.options do not fit {self.name} ({error}).') from error


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """batch_size is global, over all devices and accumulation_steps. An interval of 0 means never.

  ema_halflife_images: images after which an old weight counts half in the average; 0 for none.
  evaluate_samples: images that are sampled or read for one evaluation; 0 for no scores at all.
  evaluate_seconds: that sampling them may take, 0 for no limit; the first evaluation finds out how
  many samples that allows, and all later ones are of so many (`train.hooks`).
  Kept are the last keep_checkpoints, those of every keep_every_steps, and the one that evaluates
  best by the metric keep_best ('' for none): the lowest or highest, as keep_best_is says, or, where
  that is '', as the metric does.
  profile_first_step, profile_steps: the window that is traced into WORKDIR/profile; a SIGUSR1
  traces as many steps from then on. wandb_project: log to Weights & Biases too; '' for no.
  """

  total_steps: Positive = 1000
  batch_size: Positive = 64
  accumulation_steps: Positive = 1
  seed: Seed = 0
  ema_halflife_images: float = 0.0
  log_every_steps: Positive = 20
  checkpoint_every_steps: int = 500
  keep_checkpoints: Positive = 2
  keep_every_steps: Count = 0
  keep_best: str = ''
  keep_best_is: Literal['', 'lowest', 'highest'] = ''
  sample_every_steps: int = 500
  evaluate_every_steps: int = 0
  evaluate_samples: Count = 256
  evaluate_seconds: Seconds = 0.0
  profile_first_step: int = 0
  profile_steps: Positive = 5
  wandb_project: str = ''

  def __post_init__(self):
    if self.evaluate_every_steps and not self.evaluate_samples:
      raise UserError(
        'loop.evaluate_samples is 0; give a number of samples, or 0 with evaluate_every_steps 0 '
        'for no scores.'
      )
    if self.keep_best and not self.evaluate_every_steps:
      raise UserError(
        f'loop.keep_best is {self.keep_best!r}, but nothing is evaluated; set '
        'loop.evaluate_every_steps, or leave keep_best empty.'
      )
    if self.batch_size % self.accumulation_steps:
      raise UserError(
        f'loop.batch_size {self.batch_size} cannot be split into {self.accumulation_steps} equal '
        'parts; change loop.accumulation_steps.'
      )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """max_skipped_in_a_row: after so many the run stops. spike_deviations: a step whose loss lies so
  many standard deviations above its running mean is skipped, too; 0 for no such check.
  """

  max_skipped_in_a_row: Positive = 10
  spike_deviations: Annotated[float, Range(0, text='0 for none, or such as 6')] = 0.0


@dataclasses.dataclass(frozen=True)
class SafetyConfig(GuardConfig):
  """Limits after which something has gone wrong; seconds, 0 for no limit.

  step_timeout_seconds: without a finished step, or a sign of life of an evaluation or a save, for
  that long, all stacks are written down and the process leaves. compile_timeout_seconds: the same
  for compiling, and for the first step. peer_timeout_seconds: a process that is silent for so long
  is lost, and the others leave. checkpoint_retry_seconds: between a save that failed, such as for
  want of space, and the next try. room_timeout_seconds: that the end of a run waits for its last
  checkpoint and its model to be written, before it leaves without.
  """

  step_timeout_seconds: Seconds = 1800.0
  compile_timeout_seconds: Seconds = 7200.0
  peer_timeout_seconds: Annotated[float, Range(0, above=True)] = 60.0
  checkpoint_retry_seconds: Seconds = 60.0
  room_timeout_seconds: Seconds = 86_400.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes within a slice, whose devices share a fast network (ICI, NVLink).

  data: replicas. fsdp: parameters and batch are both split. tensor: heads and inner channels are
  split. spatial: rows of images are split, for images too large for one device; not together with
  tensor. One of the four may be -1: all devices of the slice that are left.

  dcn_data, dcn_fsdp: sizes of the same axes over slices, which a slower network (DCN) joins; one
  may be -1: all slices that are left. There are none for tensor and spatial: those talk within
  every layer, data once in a step and fsdp once for the parameters of a layer.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  spatial: int = 1
  dcn_data: int = -1
  dcn_fsdp: int = 1


Option = bool | int | float | str
"""The value of a sampler's option."""

THRESHOLDS = ('none', 'static', 'dynamic')
DECODINGS = ('whole', 'sliced', 'tiled')
"""How latents become images: a batch at once, image by image, or in overlapping tiles."""
FINITE = Range(-math.inf, math.inf, above=True, below=True, text='a finite scale, 1 for none')


@dataclasses.dataclass(frozen=True)
class SampleOptions:
  """How to sample.

  guidance_rescale: phi of Lin et al. 2024, of what the network predicts if that is epsilon or v,
  else of x_0. guidance_interval: a high of None is no bound. threshold: static clips x_0 at
  threshold_limit; dynamic clips each image at its threshold_percentile, from 1 to threshold_limit,
  and divides by that, which leaves it in [-1, 1] (Saharia et al. 2022). They are made for pixels:
  latents have unit variance and no bounds. options: of the sampler, such as its order.
  steps_offset, drop_last, fractional, set_alpha_to_one and, in places, the other arguments of
  `sampling_grid`: as the schedulers of diffusers place their steps. timesteps: what the network is
  told of them, one of `noise.LABELS`. scaled_noise: start from noise of the first level's sigma,
  not of unit variance. image_guidance: s_I of Brooks et al. 2023. perturbed_attention: s of Ahn et
  al. 2024. autoguidance: w of Karras et al. 2024. clip_skip: beside the layers that
  the model leaves out anyway, and for the prompt alone; as in diffusers, the negative prompt keeps
  them. decoding: sliced and tiled take less memory, and tiled changes colours a little.
  """

  sampler: Annotated[str, OneOf(SAMPLERS), Help(
    'one of the table in README.md, or any other word to have them listed', 'NAME'
  )] = 'dpmpp_2m'
  steps: Annotated[int, Range(1, 10_000), Help('sampling steps', 'N')] = 20
  guidance: Annotated[float, FINITE, Help('classifier-free guidance scale; 1 is none', 'G')] = 4.0
  spacing: Annotated[str, Help(
    'how the steps are placed, such as trailing, karras or beta', 'NAME'
  )] = 'trailing'
  guidance_rescale: Annotated[float, Range(0, 1), Help(
    'fraction by which guidance keeps the contrast it would raise', 'PHI'
  )] = 0.0
  guidance_interval: Annotated[tuple[float, float | None], Help(
    'noise levels sigma / alpha that are guided; HIGH may be inf', 'LOW HIGH'
  )] = (0.0, None)
  threshold: Annotated[str, OneOf(THRESHOLDS), Help(
    'none, static or dynamic: keep each estimate of the latents in bounds', 'KIND'
  )] = 'none'
  threshold_limit: Annotated[float, Range(
    0, math.inf, above=True, below=True,
    text='a number above 0, in standard deviations of the latents',
  ), Help(
    'of static: the bound, in standard deviations of the latents; of dynamic: the most that an '
    'estimate is divided by to lie in [-1, 1]', 'L'
  )] = 4.0
  threshold_percentile: Annotated[float, Range(
    0, 1, above=True, text='a fraction above 0 and up to 1'
  ), Help('of dynamic: the fraction of an image that is not clipped', 'P')] = 0.995
  options: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  steps_offset: int = 0
  drop_last: bool = False
  fractional: bool = False
  set_alpha_to_one: bool = True
  places: dict[str, Option] = dataclasses.field(default_factory=dict, hash=False)
  timesteps: Annotated[str, OneOf('diffusion_jax.diffusion.noise:LABELS')] = 'exact'
  scaled_noise: bool = False
  image_guidance: Annotated[float, FINITE, Help(
    'of a model that edits a picture: how closely to keep to it; 1 is none', 'G'
  )] = 1.0
  perturbed_attention: Annotated[float, Range(0), Help(
    'scale of perturbed-attention guidance, beside --guidance; 0 is none', 'S'
  )] = 0.0
  perturbed_part: Annotated[str, Help(
    'the part of the denoiser whose self-attention that perturbs (default: mid_block)', 'NAME'
  )] = 'mid_block'
  autoguidance: Annotated[float, FINITE, Help(
    'with --worse, scale of the guidance away from that model; 1 is none', 'W'
  )] = 1.0
  clip_skip: Annotated[int, Range(0, text='a number of layers, 0 for none'), Help(
    'layers of the text encoder to leave out at the end', 'N'
  )] = 0
  decoding: Annotated[str, OneOf(DECODINGS), Help(
    'whole, or with less memory sliced (image by image) or tiled (for large images)', 'HOW'
  )] = 'whole'

  def __post_init__(self):
    low, high = self.guidance_interval
    if not 0 <= low < (math.inf if high is None else high):
      raise UserError(
        f'guidance_interval is {low} to {high}; give two noise levels sigma / alpha from 0 on, the '
        'lower one first.'
      )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The whole configuration; the type of `settings` is the `Config` of the task.

  dtype: of the computation; parameters are always float32. remat: what the backward pass computes
  again instead of keeping it. attention: how the network that is trained computes it; frozen ones
  choose for themselves. products: of dense layers, where the loss is one of latents. weights_from:
  workdir of a run of the same network whose last weights this one begins with; '' for none.
  """

  task: Annotated[str, OneOf(TASKS)]
  data: DataConfig
  settings: Any
  optimizer: OptimizerConfig = OptimizerConfig()
  loop: LoopConfig = LoopConfig()
  safety: SafetyConfig = SafetyConfig()
  mesh: MeshConfig = MeshConfig()
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Annotated[str, OneOf('diffusion_jax.models.network:REMAT')] = 'none'
  attention: Annotated[str, OneOf('diffusion_jax.models.network:ATTENTION')] = 'auto'
  products: Annotated[str, OneOf('diffusion_jax.models.network:MATMUL_PRECISION')] = 'plain'
  weights_from: str = ''


def parse(values: Mapping[str, Any]) -> TrainingConfig:
  """Return a config typed, frozen and checked; `values` may be a ConfigDict, too.

  Raises:
    UserError: unknown, missing or dead key, wrong type or impossible value.
  """
  values = values.to_dict() if hasattr(values, 'to_dict') else values
  task = load(TASKS, values.get('task'), 'config.task')
  settings = typed(task.Config, task.as_today(values.get('settings', {})), 'config.settings.')
  return typed(TrainingConfig, {**values, 'settings': settings})


def resolved(config: TrainingConfig) -> dict[str, Any]:
  """Return every value in force, as JSON would have it; `parse` reads it back."""
  return untyped(config)


def completed(values: dict[str, Any]) -> dict[str, Any]:
  """Return a config that an older version has written with the keys that are new since."""
  try:
    return resolved(parse(values))
  except UserError:  # One of its keys is gone; the comparison will name it.
    return values
