"""Options of commands: dataclasses whose fields have a `Help`, and what several commands share."""

import argparse
import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from diffusion_jax.config import typed
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.options import CLIP
from diffusion_jax.limits import Help, Positive, Range, Seed

T = TypeVar('T')

DEFAULT_MODEL = 'asset:text-to-image-openmoji-64'
OF_SAMPLER = ('eta', 'options', 'drop_last', 'fractional', 'set_alpha_to_one', 'places',
              'timesteps', 'scaled_noise')
"""Settings that another sampler does not take over."""
OF_MODEL = (
  'base_shift', 'max_shift', 'base_image_seq_len', 'max_image_seq_len', 'time_shift_type',
  'shift_terminal',
)
"""Of `places`, what another sampler takes over: how noise levels depend on the image's size."""


@contextlib.contextmanager
def writing(out: str, option: str = '--out') -> Iterator[Path]:
  """Yield an option as a path whose folder is there. UserError where it cannot be written to."""
  path = Path(out)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
  except OSError as error:
    raise UserError(f'{option} {out} cannot be written to ({error}).') from error


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """A model, or a run that has made one."""

  workdir: Annotated[str, Help(
    'a run of train; its last checkpoint is used, averaged weights first', 'DIR'
  )] = ''
  model: Annotated[str, Help(
    f'a model directory, or asset:NAME (default: {DEFAULT_MODEL})', 'DIR'
  )] = ''
  ema_halflife_images: Annotated[float | None, Help(
    'with --workdir, another half-life of the average of weights, computed from the checkpoints; '
    "0 for no average (default: the run's own)", 'N'
  )] = None

  def __post_init__(self):
    if self.workdir and self.model:
      raise UserError('--workdir and --model are both given; leave one out.')
    if self.ema_halflife_images is not None and not self.workdir:
      raise UserError('--ema_halflife_images needs --workdir: a model alone has one average.')


def _check_diffusion(model, given: Sequence[str]) -> None:
  """Raise UserError for options that a model of another kind does not have."""
  if given and not hasattr(model, 'conditioners'):
    raise UserError(f'--{given[0]} is for models of diffusion; leave it out.')


_CLIP = f'with --clip_guidance, a CLIP with both towers (default: {CLIP})'


@dataclasses.dataclass(frozen=True)
class GuideOptions:
  """What guides samples besides the model itself."""

  worse: Annotated[str, Help(
    'a smaller or less trained model of the same kind, for --autoguidance', 'DIR'
  )] = ''
  guiding_clip: Annotated[str, Help(_CLIP, 'DIR')] = ''
  clip_cutouts: Annotated[int, Range(0, 1024), Help(
    'with --clip_guidance, random cut-outs of the picture that CLIP sees in its place at each step '
    '(default: 0, the picture as it is)', 'N'
  )] = 0
  classifier: Annotated[str, Help(
    "with --classifier_guidance, a classifier of noised latents of the model's autoencoder, or of "
    'noised pixels, trained with settings.noised', 'DIR'
  )] = ''

  def guided(self, model, weights, guides: Collection[str]):
    """Return (model, weights) with what these guides, names of `options.GUIDES`, need, and with
    the worse model."""
    from diffusion_jax.pipelines.adapters import add_classifier_guide, add_clip_guide, add_worse

    _check_diffusion(model, [*self.named_guides(), *guides])
    if 'clip_guidance' in guides:
      model, weights = add_clip_guide(model, weights, self.guiding_clip or CLIP, self.clip_cutouts)
    elif self.guiding_clip or self.clip_cutouts:
      raise UserError(
        'a CLIP that guides, and --clip_cutouts, need --clip_guidance S; give it, or neither.'
      )
    if bool(self.classifier) != ('classifier_guidance' in guides):
      raise UserError(
        '--classifier DIR and --classifier_guidance S need each other; give both, or neither.'
      )
    if self.classifier:
      model, weights = add_classifier_guide(model, weights, self.classifier)
    return add_worse(model, weights, self.worse) if self.worse else (model, weights)

  def named_guides(self) -> dict[str, str]:
    """Return option -> what it names, of those of guides that were given."""
    names = [field.name for field in dataclasses.fields(GuideOptions)]
    return {name: str(getattr(self, name)) for name in names if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class AdapterOptions(GuideOptions):
  """Adapters that others have trained for a model, and guides."""

  guiding_clip: Annotated[str, Help(_CLIP, 'DIR', flag='clip')] = ''
  lora: Annotated[tuple[str, ...], Help(
    'a LoRA or other adapter to merge, of any usual trainer; repeat for several', 'FILE[:SCALE]'
  )] = ()
  controlnet: Annotated[str, Help('a ControlNet made for the model', 'DIR')] = ''
  textual_inversion: Annotated[tuple[str, ...], Help(
    'a textual inversion; repeat for several', 'FILE'
  )] = ()

  def apply(self, model, weights, guides: Collection[str] = ()):
    """Return (model, weights) with them, and with what those guides need."""
    from diffusion_jax.pipelines.adapters import add_controlnet, add_loras, add_textual_inversion

    _check_diffusion(model, [*self.named(), *guides])
    loras = []
    for text in self.lora:
      path, _, scale = text.rpartition(':')
      try:
        path, scale = (path, float(scale)) if path else (text, 1.0)
      except ValueError:
        path, scale = text, 1.0
      loras.append((path, scale))
    weights = add_loras(model, weights, loras)
    for path in self.textual_inversion:
      weights = add_textual_inversion(model, weights, path)
    if self.controlnet:
      model, weights = add_controlnet(model, weights, self.controlnet)
    return self.guided(model, weights, guides)

  def named(self) -> dict[str, str]:
    """Return option -> what it names, of those that were given."""
    text = lambda value: ' '.join(value) if isinstance(value, tuple) else str(value)
    return {name: text(value) for name, value in vars(self).items() if value}


@dataclasses.dataclass(frozen=True)
class DrawOptions:
  """Seed and batch of samples."""

  seed: Annotated[Seed, Help('random seed, from 0 to 2**32 - 1 (default: 0)', 'S')] = 0
  batch: Annotated[Positive, Help(
    'images sampled at a time (default: 16); another number rounds otherwise: now and then a value '
    'of a picture moves by a level of 255, by more where a device multiplies in less than float32',
    'N'
  )] = 16


def add_options(parser: argparse.ArgumentParser, cls: type, title: str = '') -> None:
  """Add an option for each field of a dataclass that has a `Help`."""
  group = parser.add_argument_group(title) if title else parser
  hints = typing.get_type_hints(cls, include_extras=True)
  for field in dataclasses.fields(cls):
    name, hint = field.name, hints[field.name]
    needed = field.default is field.default_factory is dataclasses.MISSING
    kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    for note in notes:
      if isinstance(note, Help):
        taken = _taken(kind, note) | ({'required': True} if needed else {})
        text = note.text.replace('%', '%%')
        group.add_argument(f'--{note.flag or name}', dest=name, help=text, **taken)


def _taken(kind: Any, note: Help) -> dict[str, Any]:
  """Return how argparse takes values of that type."""
  metavar = {'metavar': note.metavar} if note.metavar else {}
  if kind is bool:
    return {'action': 'store_true', 'default': None}
  if typing.get_origin(kind) is tuple:
    first, second = typing.get_args(kind)
    if second is Ellipsis:
      return {'action': 'append', 'type': first, **metavar}
    first = typing.get_args(first)[0] if typing.get_origin(first) is Annotated else first
    return {'nargs': 2, 'type': first, 'metavar': tuple(note.metavar.split())}
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    kind = typing.get_args(kind)[0]
  kind = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
  if typing.get_origin(kind) is typing.Literal:
    kind = type(typing.get_args(kind)[0])
  return {'type': kind, **metavar}


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
  """Return the fields of a dataclass that were given as options."""
  values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
  return {name: value for name, value in values.items() if value is not None}


def read_options(cls: type[T], args: argparse.Namespace) -> T:
  """Return the dataclass with what was given as options. UserError for an impossible value."""
  return typed(cls, given(cls, args), '--')


def check_overrides(args: argparse.Namespace) -> None:
  """Raise UserError for what is no option of a command with --config.KEY=VALUE."""
  if stray := [a for a in args.overrides if a.startswith('-') and not a.startswith('--config.')]:
    raise UserError(
      f'{args.command} does not know {stray[0]}; keys of the config start with --config.'
    )


def open_run(options: ModelOptions, values: Mapping[str, Any]):
  """Return (the run of --workdir, its sample settings with `values` in their place)."""
  from diffusion_jax.run import TrainedRun

  run = TrainedRun(options.workdir)
  sample = with_values(run.sample, values)
  run.model.check_config(sample)
  return run, sample


def open_model(
  options: ModelOptions, values: Mapping[str, Any], mesh,
  check: Callable[[Any, Any], Any] = lambda model, sample: None,
):
  """Return (model, weights on the mesh, sample settings with `values`, the model's name).

  `check` is called with the model and the settings before any weights are read.
  """
  from diffusion_jax.pipelines.generator import read_generator

  if options.workdir:
    run, sample = open_run(options, values)
    check(run.model, sample)
    weights = run.weights(ema_halflife_images=options.ema_halflife_images)
    return run.model, run.model.on_mesh(weights, mesh), sample, options.workdir
  name = options.model or DEFAULT_MODEL
  model, parts, sample = read_generator(name)
  sample = with_values(sample, values)
  model.check_config(sample)
  check(model, sample)
  weights = {role: part.load(mesh=mesh) for role, part in parts.items()}
  return model, model.on_mesh(weights, mesh), sample, name


def with_values(sample: T, values: Mapping[str, Any]) -> T:
  """Return sample settings with those that were given in place of the model's.

  UserError: one that models of another kind have.
  """
  known = {field.name for field in dataclasses.fields(sample)}
  if other := [name for name in values if name not in known]:
    raise UserError(
      f'--{other[0]} does nothing with a model of this kind, which has {", ".join(sorted(known))}; '
      'leave it out.'
    )
  values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
  if 'guidance_interval' in values:
    low, high = values['guidance_interval']
    values['guidance_interval'] = (low, None if high == math.inf else high)
  if 'sampler' in values and values['sampler'] != sample.sampler:
    # What a published scheduler says beside its sampler's name holds for that sampler alone.
    kept = {'places': {k: v for k, v in sample.places.items() if k in OF_MODEL}}
    values = {name: getattr(type(sample)(), name) for name in OF_SAMPLER} | kept | values
  return dataclasses.replace(sample, **values)
