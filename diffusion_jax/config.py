"""Configs: nested dictionaries to frozen dataclasses, and the sections of a training.

`typed` checks keys, types and limits (see `limits`); all else is checked where it is used.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from diffusion_jax.errors import UserError
from diffusion_jax.limits import (
  MOST_EDGE,
  ByType,
  Count,
  Length,
  OneOf,
  Positive,
  Range,
  Seconds,
  Seed,
)
from diffusion_jax.mixture import PartConfig, check_mixture, described
from diffusion_jax.registry import OPTIMIZERS, TASKS, check, load
from diffusion_jax.sizes import BucketSizes, Shape, nearest_to_square, shapes_of

T = TypeVar('T')


def typed(cls: type[T], values: Mapping[str, Any], where: str = 'config.') -> T:
  """The dataclass `cls` with these values, section by section.

  Every key must be a field; fields without default must be given. A field is a scalar, a Literal of
  texts, a tuple, a dictionary, a dataclass, a union, or one of these `Annotated` with limits.
  where: prefix of keys in errors. UserError: unknown key (with the nearest known one), missing key,
  wrong type or value.
  """
  if not isinstance(values, Mapping):
    raise WrongType(f'{where.rstrip(".")} is {values!r:.80}; it must be a section of keys.')
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      hint = f'did you mean {where}{close[0]}?' if close else f'known: {", ".join(fields)}.'
      raise UserError(f'{where}{key} is not a known key; {hint}')
  for name, field in fields.items():
    if name not in values and field.default is field.default_factory is dataclasses.MISSING:
      raise UserError(f'{where}{name} is missing; set it.')
  return cls(**{k: convert(hints[k], value, f'{where}{k}') for k, value in values.items()})


def untyped(value: Any) -> Any:
  """A dataclass as JSON-ready dictionaries of all values; `typed`, or `parse`, reads them back."""
  if isinstance(value, Mapping):
    return {key: untyped(item) for key, item in value.items()}
  if isinstance(value, (tuple, list)):
    return [untyped(item) for item in value]
  if not dataclasses.is_dataclass(value):
    return value
  hints = typing.get_type_hints(type(value), include_extras=True)
  found = {}
  for field in dataclasses.fields(value):
    section = getattr(value, field.name)
    found[field.name] = untyped(section)
    for limit in getattr(hints[field.name], '__metadata__', ()):
      if isinstance(limit, ByType) and dataclasses.is_dataclass(section):
        kind = limit.name(section)
        found[field.name] = ({'type': kind} if kind else {}) | found[field.name]
  return found


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Return nested dictionaries as one with dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def convert(hint: Any, value: Any, where: str) -> Any:
  """Return the value as a type, see `typed`. UserError, which begins with `where`, for another."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return _limited(*arguments, value=value, where=where)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else typed(hint, value, f'{where}.')
  if origin is Literal:
    return check(arguments, value, where)
  if origin in (typing.Union, types.UnionType):
    beyond = []
    for choice in arguments:
      try:
        return convert(choice, value, where)
      except WrongType:
        continue
      except UserError as error:  # Of the right type, and beyond a limit.
        beyond.append(error)
    if beyond:
      raise beyond[0]
  elif origin is dict and isinstance(value, Mapping):
    return {key: convert(arguments[1], item, f'{where}.{key}') for key, item in value.items()}
  elif tuple in (hint, origin) and isinstance(value, (tuple, list)):
    kinds = arguments or (Any, ...)
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(kinds) == len(value):
      items = enumerate(zip(kinds, value, strict=True))
      return tuple(convert(kind, item, f'{where}[{i}]') for i, (kind, item) in items)
  elif hint is float and type(value) is int:  # And no bool, which is an int in Python.
    return float(value)
  elif hint is Any or type(value) is hint:
    return value
  name = _name(hint)
  raise WrongType(f'{where} is {value!r:.80}, a {type(value).__name__}; it must be {name}.')


class WrongType(UserError):
  """A value of another type than its key has."""


def _name(hint: Any) -> str:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return _name(arguments[0])
  if origin in (typing.Union, types.UnionType):
    return ' | '.join(map(_name, arguments))
  if origin is tuple:
    return f'tuple[{", ".join("..." if part is ... else _name(part) for part in arguments)}]'
  return str(hint) if origin else getattr(hint, '__name__', str(hint))


def _limited(hint: Any, *limits: Any, value: Any, where: str) -> Any:
  for limit in limits:
    if isinstance(limit, ByType) and isinstance(value, Mapping):
      rest = dict(value)
      section = limit.section(rest.pop('type', limit.default), where)
      return typed(section, rest, f'{where}.')
  converted = convert(hint, value, where)
  for limit in limits:
    if isinstance(limit, (Range, Length, OneOf)):
      limit.check(converted, where)
  return converted


WHITE, _COLOR = 'white', r'white|black|gray|red|green|blue|#[0-9a-fA-F]{6}'


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """dataset: a name of `SOURCES`, some with more after a colon, such as 'folder:PATH'; '' with a
  mixture: several data sets, by names for them. test_of: the one of those whose test records count,
  '' for those of all. size: edge of the images in pixels, or their (height, width), or points in a
  record; a picture is scaled until it covers that, and its middle cut out. Several (height, width),
  or `BucketSizes`, are buckets: a picture goes into that of the nearest ratio, and all of a batch
  are of one; of tests and previews all are of the one nearest to a square. most_buckets: sizes at
  most, since the step is compiled for each. prepare: make it if missing. transforms: (name,
  arguments) pairs in order, applied to every training image. workers: threads that read and
  transform in each process; 0 does it between the steps. most_unreadable: fraction of the records
  of a split that may be damaged, which are named and replaced; with more the run ends.

  Of pictures of one's own alone: crop: what is cut out of a scaled training picture, its middle or
  any part of it. background: the color behind transparent places. processes: decode for the
  threads, 0 for none. caption: of every picture without one of its own, or several, one a line;
  {name}, {folder} and {label} in it are words of the picture's path and its class, {path} is all of
  the path. caption_column: the one column of captions in lists and tables, '' for all of
  `fields.CAPTIONS`. test_fraction: of the pictures that are left to the test split where there is
  none; 0 to train on all.
  """

  dataset: str
  size: int | tuple[int, int] | tuple[tuple[int, int], ...] | BucketSizes
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
  most_buckets: Positive = 40
  mixture: dict[str, PartConfig] = dataclasses.field(default_factory=dict)
  test_of: str = ''
  background: str = WHITE
  crop: Literal['middle', 'random'] = 'middle'
  processes: Count = 0

  def __post_init__(self):
    check_mixture(self.mixture, self.dataset, self.test_of)
    if not re.fullmatch(_COLOR, self.background):
      raise UserError(
        f"data.background is {self.background!r:.80}; give a color such as 'white' or '#7f7f7f'."
      )
    if isinstance(self.size, int):
      return
    shapes = self.shapes if self.size else ()
    if not shapes or not all(1 <= edge <= MOST_EDGE for shape in shapes for edge in shape):
      raise UserError(
        f'data.size is {self.size}; give height and width in pixels, 1 to {MOST_EDGE} each.'
      )
    if len(set(shapes)) < len(shapes):
      raise UserError('data.size has the same height and width twice; leave out one of them.')
    if len(shapes) > self.most_buckets:
      raise UserError(
        f'data.size gives {len(shapes)} sizes, for each of which the step would be compiled, but '
        f'data.most_buckets is {self.most_buckets}; give fewer sizes, or raise it.'
      )

  @property
  def name(self) -> str:
    """The data set, or those of a mixture."""
    return described(self.mixture) if self.mixture else self.dataset

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """(height, width) of the images of each bucket; of all, where there is but one."""
    return shapes_of(self.size)

  @property
  def sizes(self) -> tuple[int | Shape, ...]:
    """The size of each bucket as it is given: a number, or (height, width)."""
    return (self.size,) if isinstance(self.size, int) else self.shapes

  @property
  def shape(self) -> Shape:
    """(height, width) of the images, of several the one nearest to a square."""
    return nearest_to_square(self.shapes)

  @property
  def edge(self) -> int:
    """The longer edge of images of `shape`."""
    return max(self.shape)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """name: of `OPTIMIZERS`. learning_rate: peak. schedule: from the end of the warm-up to the last
  step, ending at final_fraction of the peak. b1, b2, eps, weight_decay: of those that have them.
  clip_norm: largest global gradient norm, 0 for none. groups: (regular expression over parameter
  names, factor on the learning rate); the first that matches counts, factor 0 freezes, no match
  means 1. moments: type in which they are stored, of 8 bits with the codes of
  `train.optimizers.moments`. options: the optimizer's own keys.
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
  moments: Literal['float32', 'bfloat16', 'int8_dynamic', 'int8_linear'] = 'float32'

  def __post_init__(self):
    if self.name == 'adamw' and not self.options:
      return  # Nothing is imported.
    typed_apart = [key for key in self.options if key in ('mu_dtype', 'accumulator_dtype')]
    if typed_apart and self.moments != 'float32':
      raise UserError(
        f'optimizer.moments is {self.moments!r}, and optimizer.options.{typed_apart[0]} is another '
        'type for the same; leave out one of them.'
      )
    try:
      self.transformation(lambda n: 0.0, {})
    except (TypeError, ValueError) as error:
      raise UserError(f'optimizer.options do not fit {self.name} ({error}).') from error

  def transformation(self, schedule: Callable[[Any], Any], mask: Mapping[str, bool]) -> Any:
    """What its row of `OPTIMIZERS` makes; UserError for an unknown or unfit key of the options."""
    make = load(OPTIMIZERS, self.name, 'optimizer.name')
    every = inspect.signature(make).parameters.values()
    own = [one.name for one in every if one.kind is one.KEYWORD_ONLY]
    if not own:  # It reads the options itself.
      return make(self, schedule, mask)
    hints = typing.get_type_hints(make, include_extras=True)
    for key, value in self.options.items():
      if key not in own:
        near = difflib.get_close_matches(key, own, n=1)
        hint = f'did you mean {near[0]}?' if near else f'its keys are {", ".join(own)}.'
        raise UserError(
          f'optimizer.options do not fit {self.name} (it has no {key!r:.80}); {hint}'
        )
      convert(hints[key], value, f'optimizer.options.{key}')
    return make(self, schedule, mask, **self.options)


DECIDING = ('keep_best', 'stop_when')
"""Keys of `loop` that name a metric of the evaluation, whose KEY_is says which way is better."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """batch_size is global, over all devices and accumulation_steps. An interval of 0 means never.

  ema_halflife_images: images after which an old weight counts half in the average; 0 for none.
  evaluate_samples: images that are sampled or read for one evaluation; 0 for no scores but those of
  `evaluators`.
  evaluate_seconds: that sampling them may take, 0 for no limit; the first evaluation finds out how
  many samples that allows, and all later ones are of so many (`train.hooks`).
  evaluators: beside those of the task, names of `EVALUATORS` or (name, arguments) pairs; the data's
  train and test, the mesh and the task's sample settings are given to whichever takes them.
  Kept are the last keep_checkpoints, those of every keep_every_steps, and the one that evaluates
  best by the metric keep_best ('' for none): the lowest or highest, as keep_best_is says, or, where
  that is '', as the metric does.
  A run ends early once stop_patience evaluations in a row were no better by more than stop_margin
  than the best by the metric stop_when ('' for never), whose best is as stop_when_is says.
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
  stop_when: str = ''
  stop_when_is: Literal['', 'lowest', 'highest'] = ''
  stop_patience: Positive = 3
  stop_margin: Annotated[float, Range(0)] = 0.0
  sample_every_steps: int = 500
  evaluate_every_steps: int = 0
  evaluate_samples: Count = 256
  evaluate_seconds: Seconds = 0.0
  evaluators: tuple = ()
  profile_first_step: int = 0
  profile_steps: Positive = 5
  wandb_project: str = ''

  def __post_init__(self):
    if self.evaluate_every_steps and not (self.evaluate_samples or self.evaluators):
      raise UserError(
        'loop.evaluate_samples is 0; give a number of samples, or 0 with evaluate_every_steps 0 '
        'for no scores.'
      )
    for key in DECIDING:
      if getattr(self, key) and not self.evaluate_every_steps:
        raise UserError(
          f'loop.{key} is {getattr(self, key)!r}, but nothing is evaluated; set '
          f'loop.evaluate_every_steps, or leave {key} empty.'
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
  """Time limits in seconds, 0 for none, after which a run counts as stuck.

  step_timeout_seconds: without a finished step, or a heartbeat of an evaluation or save, all stacks
  are written and the process leaves. compile_timeout_seconds: the same for compiling and the first
  step. peer_timeout_seconds: a process silent for so long is lost, and the others leave.
  checkpoint_retry_seconds: between a failed save, as without space, and the next try.
  room_timeout_seconds: longest wait at the end of a run for its last checkpoint and model.
  """

  step_timeout_seconds: Seconds = 1800.0
  compile_timeout_seconds: Seconds = 7200.0
  peer_timeout_seconds: Annotated[float, Range(0, above=True)] = 60.0
  checkpoint_retry_seconds: Seconds = 60.0
  room_timeout_seconds: Seconds = 86_400.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes within a slice, whose devices share a fast network (ICI, NVLink).

  data: replicas. fsdp: parameters and batch are split. tensor: heads and inner channels are split.
  spatial: rows of images are split, for images too large for one device; not with tensor. One of
  the four may be -1: all devices of the slice that are left.

  dcn_data, dcn_fsdp: the same axes over slices, joined by a slower network (DCN); one may be -1:
  all slices that are left. tensor and spatial stay within: they communicate in every layer.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  spatial: int = 1
  dcn_data: int = -1
  dcn_fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The whole configuration; the type of `settings` is the `Config` of the task.

  dtype: of the computation; parameters are float32. remat: activations that the backward pass
  computes again. attention: of the trained network; frozen ones choose for themselves. products: of
  dense layers, where the loss is one of latents. weights_from: workdir of a run of the same
  network, whose last weights start this one; '' for none. deterministic: on GPUs the step gives
  the same bits each time, slower; on other chips it always does.
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
  deterministic: bool = False


def parse(values: Mapping[str, Any]) -> TrainingConfig:
  """A config typed, frozen and checked; `values` may be a ConfigDict.

  UserError: unknown, missing or useless key, wrong type or impossible value.
  """
  values = values.to_dict() if hasattr(values, 'to_dict') else values
  task = load(TASKS, values.get('task'), 'config.task')
  settings = task.upgrade_settings(values.get('settings', {}))
  settings = typed(task.Config, settings, 'config.settings.')
  return typed(TrainingConfig, {**values, 'settings': settings})


def completed(values: dict[str, Any]) -> dict[str, Any]:
  """Return a config that an older version has written with the keys that are new since."""
  try:
    return untyped(parse(values))
  except UserError:  # One of its keys is gone; the comparison will name it.
    return values
