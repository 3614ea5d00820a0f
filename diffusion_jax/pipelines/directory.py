"""Models in directories: `formats.pipeline` reads and writes the parts, here is what they make."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import typed, untyped
from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import INDEX, reading
from diffusion_jax.formats.clip import PREPROCESSOR, pixel_statistics
from diffusion_jax.formats.networks import Part, resolve, save_params
from diffusion_jax.formats.pipeline import (
  CONVERSION,
  DIFFUSION,
  FOLDERS,
  SCHEDULER,
  TEXT_TO_IMAGE,
  Pipeline,
  export_scheduler,
  keep_changed,
  keep_folder,
  own_path,
  own_terms,
  read_pipeline,
)
from diffusion_jax.formats.scheduler import Scheduler
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.pipelines.assembly import assemble, make_model
from diffusion_jax.pipelines.conditioners import ClassLabel, Conditioner
from diffusion_jax.pipelines.distilled import DistilledGuidance, imitates_guidance
from diffusion_jax.pipelines.image_conditioners import (
  CONTROLNET,
  IMAGE_ENCODER,
  ControlNet,
  ImageEncoder,
)
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.pipelines.published import (
  DENOISER_KINDS,
  DENOISERS,
  check_class,
  published,
  text_encoders,
)
from diffusion_jax.pipelines.sampling import PLACES, SampleConfig
from diffusion_jax.pipelines.spaces import AUTOENCODER, LatentConfig, LatentSpace
from diffusion_jax.pipelines.text_conditioners import (
  ROLES,
  TEXT_KINDS,
  tokenizer_role,
)
from diffusion_jax.registry import CONDITIONERS, NETWORKS, SPACES, load
from diffusion_jax.types import Params, Weights


def read_model(path: str, dtype=jnp.float32) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """(model without weights, its parts, how to sample) of a directory or 'asset:NAME'.

  UserError: no directory, no model in it, or a part that is missing or not implemented.
  """
  pipeline = read_pipeline(path, _NAMES)
  if pipeline.kind not in (TEXT_TO_IMAGE, DIFFUSION):
    check_class(pipeline.kind, str(resolve(path) / INDEX))
  scheduler = pipeline.scheduler()
  if pipeline.kind == DIFFUSION:
    model, parts = _assembled(pipeline, resolve(path), scheduler, dtype)
    sample = _sample(pipeline, scheduler, path)
  else:
    model, parts, sample = _published(pipeline, path, scheduler, dtype)
  if CONVERSION in pipeline.index:
    model, sample = _converted(pipeline.index[CONVERSION], model, path)
  return model, parts, sample


def _published(
  pipeline: Pipeline, path: str, scheduler: Scheduler, dtype
) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """A model in the folders of a pipeline of diffusers, and how it samples."""
  parts = _networks(pipeline, path)
  sample = _sample(pipeline, scheduler, path, parts)
  conditioners = _prompts(pipeline, parts, path, dtype)
  if imitates_guidance(parts[DENOISER].config) and sample.guidance != 1:
    # It is told the scale that others are guided with.
    conditioners[DistilledGuidance.name] = DistilledGuidance(sample.guidance)
    sample = dataclasses.replace(sample, guidance=1.0)
  if CONTROLNET in parts:
    conditioners['control'] = ControlNet({CONTROLNET: parts[CONTROLNET].network(dtype=dtype)})
  low = 'low_res_scheduler'
  model = make_model(
    parts[DENOISER].network(dtype=dtype),
    LatentSpace(parts[AUTOENCODER].network(dtype=dtype), pipeline.latent_patch_size), conditioners,
    NoiseSchedule.of(scheduler.schedule),
    Parameterization(scheduler.prediction, scheduler.data_std),
    Schedule(pipeline.scheduler(low).schedule) if low in pipeline.parts else None,
  )
  _check_scores(pipeline, model, path)
  return model, parts, sample


def _check_scores(pipeline: Pipeline, model: Diffusion, path: str) -> None:
  """Raise UserError where the index says otherwise than the denoiser whether it is a refiner."""
  key = 'requires_aesthetics_score'
  said, sizes = pipeline.index.get(key), model.conditioners.get('sizes')
  require(
    said is None or sizes is None or bool(said) == sizes.aesthetic,
    f'{resolve(path) / INDEX} has {key} {said}, but the U-Net is '
    f'{"one" if sizes and sizes.aesthetic else "none"} that is given a score; correct it.',
  )


_KINDS = {
  **dict.fromkeys(DENOISERS, DENOISER_KINDS), 'vae': ('autoencoder',),
  'controlnet': ('controlnet',),
  **dict.fromkeys(ROLES, TEXT_KINDS), IMAGE_ENCODER: ('clip_vision_projection',),
}
_NAMES = {
  *_KINDS, *map(tokenizer_role, ROLES), 'scheduler',
  'low_res_scheduler', 'feature_extractor',
}
"""The parts of a pipeline that are read."""


def _networks(pipeline: Pipeline, path: str) -> dict[str, Part]:
  """The network parts, by the role of their weights."""
  found = {name: pipeline.parts[name] for name in _KINDS if name in pipeline.parts}
  if any(role in found for role in ROLES):
    found.pop(IMAGE_ENCODER, None)
  row = published(pipeline.kind, found)
  for name in (row.denoiser, 'vae'):
    if name not in found:
      raise UserError(f'{resolve(path) / INDEX} names no {name}; give a text-to-image pipeline.')
  roles = {folder: role for role, folder in FOLDERS.items()} | {row.denoiser: DENOISER}
  kinds = {**_KINDS, row.denoiser: row.kinds}
  return {roles.get(name, name): part.expect(kinds[name]) for name, part in found.items()}


def _assembled(
  pipeline: Pipeline, directory: Path, scheduler: Scheduler, dtype
) -> tuple[Diffusion, dict[str, Part]]:
  """A model of the class DIFFUSION, whose index has the arguments of `assemble`."""
  place = lambda path, _='': own_path(path, directory)
  index, where = pipeline.index, directory / INDEX
  with reading(where, 'describes no model', 'export it again'):
    section = dict(index['space'])
    kind = load(SPACES, section.pop('type'), f'{where}: space')
    section = {k: place(str(v)) if k in kind.paths else v for k, v in section.items()}
    space = typed(getattr(kind, 'Config', kind), section, 'space.')
    conditioners = {
      name: load(CONDITIONERS, name, f'{where}: conditioners').moved(name, options, place)
      for name, options in index['conditioners'].items()
    }
    size = tuple(map(int, index.get('size') or ()))
  denoiser = pipeline.parts['unet'].expect(tuple(NETWORKS))
  model, parts = assemble(
    denoiser.config, space, conditioners, scheduler.schedule,
    Parameterization(scheduler.prediction, scheduler.data_std), size=size or None, dtype=dtype,
  )
  return model, {DENOISER: denoiser, **parts}


def _prompts(
  pipeline: Pipeline, parts: Mapping[str, Part], path: str, dtype
) -> dict[str, Conditioner]:
  """The conditioner that reads the prompts of a model, or the picture in place of them, by name."""
  if not published(pipeline.kind, parts).encoders:
    return {'class': ClassLabel(_classes(pipeline, parts[DENOISER].config.num_embeds_ada_norm))}
  roles = [role for role in ROLES if role in parts]
  if not roles and IMAGE_ENCODER in parts:
    extractor = pipeline.parts.get('feature_extractor', Part())
    pixels = pixel_statistics(*extractor.json(PREPROCESSOR))
    encoder = parts[IMAGE_ENCODER].network(dtype=dtype)
    return {'text': ImageEncoder({IMAGE_ENCODER: encoder}, **pixels)}
  if not roles:
    raise UserError(f'{path} has no text encoder; give a text-to-image model.')
  return {'text': text_encoders(pipeline, parts, path, parts[DENOISER].config, dtype)}


def _classes(pipeline: Pipeline, count: int | None) -> tuple[str, ...]:
  """The names of so many classes; their numbers where the index has no names."""
  names = pipeline.index.get('id2label') or {}
  require(isinstance(names, dict), f'{INDEX}: id2label must be an object of names by number.')
  return tuple(str(names.get(str(number), number)) for number in range(count or 0))


def _sample(
  pipeline: Pipeline, scheduler: Scheduler, path: str, names: Iterable[str] = ()
) -> SampleConfig:
  if pipeline.kind not in (TEXT_TO_IMAGE, DIFFUSION):
    return sample_config(scheduler, pipeline.kind, names)
  return _typed_sample(pipeline.index.get('sample', {}), path)


def _typed_sample(given: Any, path: str) -> SampleConfig:
  """How to sample, by what an index written here says."""
  known = {field.name for field in dataclasses.fields(SampleConfig)}
  if isinstance(given, dict):  # Later versions may say more.
    given = {key: value for key, value in given.items() if key in known}
  try:
    return typed(SampleConfig, given, 'sample.')
  except UserError as error:
    raise UserError(f'{path} cannot be sampled: {error}') from error


def _converted(
  entries: Any, model: Diffusion, path: str
) -> tuple[Diffusion, SampleConfig]:
  """The model as it was trained, where that is not as its network was published."""
  where = f'{resolve(path) / INDEX}: {CONVERSION}'
  require(isinstance(entries, dict), f'{where} is {shown(entries)}; it must be an object.')
  own = entries.get('network')
  require(isinstance(own, dict), f'{where}: network is {shown(own)}; it must be an object.')
  for terms, exact in ((own_terms(own, where), False), (own_terms(entries, where), True)):
    model = model.in_terms(terms.prediction, terms.schedule, exact)
  return model, _typed_sample(entries.get('sample', {}), path)


def save_conversion(directory: Path, model: Diffusion, sample: SampleConfig) -> None:
  """Write into a pipeline's index in what terms, and with what samples, it was trained on.

  Where the network is as published, and another prediction is made of it, the scheduler stays that
  of the network, by which other programs read it; else the scheduler is the model's.
  """
  index, own = read_json(directory / INDEX), model.network_terms
  terms = lambda prediction, noise: {'prediction': prediction, 'noise': noise.saved()}
  if own == (model.parameterization.name, model.noise.config):
    scheduler = scheduler_of(model, sample)
    index |= export_scheduler(directory, scheduler)
    values = read_json(file) if (file := directory / 'scheduler' / SCHEDULER).is_file() else {}
    if isinstance(index.get('scheduler'), list) and values:
      index['scheduler'] = ['diffusers', values['_class_name']]
  index[CONVERSION] = terms(model.parameterization.name, model.noise.config) | {
    'network': terms(*own), 'sample': dataclasses.asdict(sample),
  }
  write_json(directory / INDEX, index)


_SHARED = (
  'sampler', 'options', 'spacing', 'threshold', 'threshold_limit', 'threshold_percentile',
  'timesteps', 'scaled_noise',
)
"""Fields that `Scheduler` and `SampleConfig` have in common."""


def sample_config(
  scheduler: Scheduler, pipeline: str | None = None, names: Iterable[str] = ()
) -> SampleConfig:
  """Return how a pipeline of diffusers of this class, with parts of these names, samples where
  nothing else is asked."""
  grid = dict(scheduler.grid)
  own = {name: grid.pop(name) for name in PLACES if name in grid}
  own |= {name: getattr(scheduler, name) for name in _SHARED}
  plain = {'steps': 50, 'guidance': 7.5, 'places': grid}
  return SampleConfig(**{**own, **plain, **published(pipeline, names).sample})


def scheduler_of(model: Diffusion, sample: SampleConfig) -> Scheduler:
  """Return the scheduler of a model that is sampled so."""
  plain = SampleConfig()
  grid = {name: getattr(sample, name) for name in PLACES}
  grid = {name: value for name, value in grid.items() if value != getattr(plain, name)}
  return Scheduler(
    model.noise.config, model.parameterization.name, grid=grid | sample.places,
    data_std=model.parameterization.data_std, **{name: getattr(sample, name) for name in _SHARED},
  )


def load_model(
  path: str, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights, SampleConfig]:
  """Return `read_model` with the weights, tensor by tensor onto the mesh, or on the host."""
  model, parts, sample = read_model(path, dtype)
  return model, {role: part.load(mesh=mesh) for role, part in parts.items()}, sample


_NONE: Mapping[str, Any] = MappingProxyType({})
_SINGLE = {'clip': ROLES[0], 'text_path': ROLES[0]}
"""Folders that a text encoder is copied to where there is one alone."""


def save_model(
  directory: Path, model: Diffusion, denoiser: Params, *, space: Any,
  conditioners: Mapping[str, Mapping[str, Any]], sample: SampleConfig, dtype: str,
  texts: Mapping[str, tuple[Any, Params]] = _NONE,
) -> None:
  """Write a model trained here, with copies of its frozen parts or the assets' names.

  A U-Net on latents with texts and a table of noise levels has the folders of a diffusers pipeline;
  others are of the class DIFFUSION. denoiser: its parameters. space, conditioners: as in
  `assemble`. texts: (config, parameters) of text encoders that have changed, by role.
  """
  def keep(path: str, name: str) -> str:
    changed = texts.get(_SINGLE.get(name, name))
    if changed is None:
      return keep_folder(path, directory, name)
    return keep_changed(path, directory, name, changed, dtype)

  index = {
    'sample': dataclasses.asdict(sample), 'noise': model.noise.config.saved(),
    'prediction': model.parameterization.name, 'data_std': model.parameterization.data_std,
    **export_scheduler(directory, scheduler_of(model, sample)),
  }
  plain = list(conditioners) == ['text'] and type(model.denoiser.config) is UNetConfig
  plain = plain and model.denoiser.config.sample_size is not None
  plain = plain and set(conditioners['text']) == {'path'} and set(model.text.towers) == {ROLES[0]}
  if plain and type(space) is LatentConfig and model.noise.table is not None:
    folder, config = FOLDERS[DENOISER], model.written_config
    index |= {'_class_name': TEXT_TO_IMAGE, 'latent_patch_size': space.patch} | {
      role: keep(path, role) for role, path in (
        (AUTOENCODER, space.autoencoder), ('clip', conditioners['text']['path'])
      )
    }
  else:
    folder, config = DENOISER, model.denoiser.config
    index |= {'_class_name': DIFFUSION} | _described(model, space, conditioners, keep)
  save_params(directory / folder, config, denoiser, dtype=dtype)
  write_json(directory / INDEX, index)


def _described(
  model: Diffusion, space: Any, conditioners: Mapping[str, Mapping[str, Any]],
  keep: Callable[[str, str], str],
) -> dict[str, Any]:
  """What the index of a model of the class DIFFUSION says of its parts, which are copied.

  keep: (path of a part, the folder that it is copied to) -> what the index says.
  """
  options, found = untyped(space), model.conditioners
  folders = {key: keep(options[key], f'space_{key}') for key in model.space.paths}
  return {
    'size': model.size, 'space': {'type': model.space.name} | options | folders,
    'conditioners': {
      name: found[name].moved(name, {**options, **found[name].options()}, keep)
      for name, options in conditioners.items()
    },
  }
