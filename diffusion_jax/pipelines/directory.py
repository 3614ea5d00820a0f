"""Models in directories: `formats.pipeline` reads and writes the parts, here is what they make."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import typed, untyped
from diffusion_jax.diffusion.noise import NoiseSchedule, Schedule
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX, reading
from diffusion_jax.formats.clip import pixel_statistics
from diffusion_jax.formats.networks import Part, resolve, save_params
from diffusion_jax.formats.pipeline import (
  DIFFUSION,
  FOLDERS,
  TEXT_TO_IMAGE,
  Pipeline,
  export_scheduler,
  keep_folder,
  own_path,
  read_pipeline,
)
from diffusion_jax.formats.scheduler import Scheduler
from diffusion_jax.formats.tensors import write_json
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.pipelines.assembly import assemble, make_model
from diffusion_jax.pipelines.conditioners import ROLES, TEXT_KINDS, TextEncoders
from diffusion_jax.pipelines.image_conditioners import (
  CONTROLNET,
  IMAGE_ENCODER,
  ControlNet,
  ImageEncoder,
)
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.pipelines.sampling import PLACES, SampleConfig
from diffusion_jax.pipelines.spaces import AUTOENCODER, LatentConfig, LatentSpace
from diffusion_jax.registry import CONDITIONERS, NETWORKS, SPACES, load
from diffusion_jax.types import Params, Weights

EDITS = 'StableDiffusionInstructPix2PixPipeline'
"""The class of diffusers that is guided by its picture, too, with a scale of 1.5."""


def read_model(path: str, dtype=jnp.float32) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """(model without weights, its parts, how to sample) of a directory or 'asset:NAME'.

  UserError: no directory, no model in it, or a part that is missing or not implemented.
  """
  pipeline = read_pipeline(path, _NAMES)
  scheduler = pipeline.scheduler()
  sample = _sample(pipeline, scheduler, path)
  if pipeline.kind == DIFFUSION:
    return *_assembled(pipeline, resolve(path), scheduler, dtype), sample
  parts = _networks(pipeline, path)
  conditioners = {'text': _prompts(pipeline, parts, path, dtype)}
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
  return model, parts, sample


_KINDS = {
  'unet': ('unet',), 'vae': ('autoencoder',), 'controlnet': ('controlnet',),
  **dict.fromkeys(ROLES, TEXT_KINDS), IMAGE_ENCODER: ('clip_vision_projection',),
}
_NAMES = {
  *_KINDS, *(role.replace('text_encoder', 'tokenizer') for role in ROLES), 'scheduler',
  'low_res_scheduler', 'feature_extractor',
}
"""The parts of a pipeline that are read."""


def _networks(pipeline: Pipeline, path: str) -> dict[str, Part]:
  """The network parts, by the role of their weights."""
  found = {name: pipeline.parts[name] for name in _KINDS if name in pipeline.parts}
  if any(role in found for role in ROLES):
    found.pop(IMAGE_ENCODER, None)
  for name in ('unet', 'vae'):
    if name not in found:
      raise UserError(f'{resolve(path) / INDEX} names no {name}; give a text-to-image pipeline.')
  roles = {folder: role for role, folder in FOLDERS.items()}
  return {roles.get(name, name): part.expect(_KINDS[name]) for name, part in found.items()}


def _assembled(
  pipeline: Pipeline, directory: Path, scheduler: Scheduler, dtype
) -> tuple[Diffusion, dict[str, Part]]:
  """A model of the class DIFFUSION, whose index has the arguments of `assemble`."""
  def placed(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {k: own_path(str(v), directory) if k in kind.paths else v for k, v in options.items()}

  index, where = pipeline.index, directory / INDEX
  with reading(where, 'describes no model', 'export it again'):
    section = dict(index['space'])
    kind = load(SPACES, section.pop('type'), f'{where}: space')
    space = typed(getattr(kind, 'Config', kind), placed(section, kind), 'space.')
    conditioners = {
      name: placed(options, load(CONDITIONERS, name, f'{where}: conditioners'))
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
) -> TextEncoders | ImageEncoder:
  """The conditioner of a model's prompts, or of the picture in their place."""
  roles = [role for role in ROLES if role in parts]
  if not roles and IMAGE_ENCODER in parts:
    extractor = pipeline.parts.get('feature_extractor', Part())
    pixels = pixel_statistics(*extractor.json('preprocessor_config.json'))
    return ImageEncoder({IMAGE_ENCODER: parts[IMAGE_ENCODER].network(dtype=dtype)}, **pixels)
  if not roles:
    raise UserError(f'{path} has no text encoder; give a text-to-image model.')
  names = [role.replace('text_encoder', 'tokenizer') for role in roles]
  folders = [
    resolve(pipeline.parts[name].path) if name in pipeline.parts else resolve(path) / name
    for name in names
  ]
  sdxl = len(roles) > 1
  return TextEncoders(
    {role: parts[role].network(dtype=dtype) for role in roles}, tuple(map(load_tokenizer, folders)),
    skip=int(sdxl), normalize=not sdxl, pooled=sdxl,
    zero_null=bool(pipeline.index.get('force_zeros_for_empty_prompt', sdxl)) and sdxl,
  )


def _sample(pipeline: Pipeline, scheduler: Scheduler, path: str) -> SampleConfig:
  if pipeline.kind not in (TEXT_TO_IMAGE, DIFFUSION):
    return sample_config(scheduler, pipeline.kind)
  known = {field.name for field in dataclasses.fields(SampleConfig)}
  given = pipeline.index.get('sample', {})
  if isinstance(given, dict):  # Later versions may say more.
    given = {key: value for key, value in given.items() if key in known}
  try:
    return typed(SampleConfig, given, 'sample.')
  except UserError as error:
    raise UserError(f'{path} cannot be sampled: {error}') from error


_SHARED = (
  'sampler', 'options', 'spacing', 'threshold', 'threshold_limit', 'threshold_percentile',
  'timesteps', 'scaled_noise',
)
"""Fields that `Scheduler` and `SampleConfig` have in common."""


def sample_config(scheduler: Scheduler, pipeline: str | None = None) -> SampleConfig:
  """Return how a pipeline of diffusers with this scheduler samples where nothing else is asked."""
  grid = dict(scheduler.grid)
  own = {name: grid.pop(name) for name in PLACES if name in grid}
  own |= {name: getattr(scheduler, name) for name in _SHARED}
  edits = 1.5 if pipeline == EDITS else 1.0
  return SampleConfig(**own, steps=50, guidance=7.5, image_guidance=edits, places=grid)


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


def save_model(
  directory: Path, model: Diffusion, denoiser: Params, *, space: Any,
  conditioners: Mapping[str, Mapping[str, Any]], sample: SampleConfig, dtype: str,
) -> None:
  """Write a model trained here, with copies of its frozen parts or the assets' names.

  A U-Net on latents with texts and a table of noise levels has the folders of a diffusers pipeline;
  others are of the class DIFFUSION. denoiser: its parameters. space, conditioners: as in
  `assemble`.
  """
  index = {
    'sample': dataclasses.asdict(sample), 'noise': model.noise.config.saved(),
    'prediction': model.parameterization.name, 'data_std': model.parameterization.data_std,
    **export_scheduler(directory, scheduler_of(model, sample)),
  }
  texts = list(conditioners) == ['text'] and type(model.denoiser.config) is UNetConfig
  texts = texts and model.denoiser.config.sample_size is not None
  if texts and type(space) is LatentConfig and model.noise.table is not None:
    folder = FOLDERS[DENOISER]
    index |= {'_class_name': TEXT_TO_IMAGE, 'latent_patch_size': space.patch} | {
      role: keep_folder(path, directory, role) for role, path in (
        (AUTOENCODER, space.autoencoder), ('clip', conditioners['text']['path'])
      )
    }
  else:
    folder = DENOISER
    index |= {'_class_name': DIFFUSION} | _described(directory, model, space, conditioners)
  save_params(directory / folder, model.denoiser.config, denoiser, dtype=dtype)
  write_json(directory / INDEX, index)


def _described(
  directory: Path, model: Diffusion, space: Any, conditioners: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """Index entries of a DIFFUSION model's parts, which are copied."""
  def kept(options: Mapping[str, Any], part: Any, name: str) -> dict[str, Any]:
    folders = {key: keep_folder(options[key], directory, f'{name}_{key}') for key in part.paths}
    return {**options, **folders}

  return {
    'size': model.size,
    'space': {'type': model.space.name} | kept(untyped(space), model.space, 'space'),
    'conditioners': {
      name: kept({**options, **model.conditioners[name].options()}, model.conditioners[name], name)
      for name, options in conditioners.items()
    },
  }
