"""Models from the parts of a directory, which `formats.pipeline` reads and writes."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import typed, untyped
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule, Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX, inside, reading
from diffusion_jax.formats.clip import pixel_statistics
from diffusion_jax.formats.networks import format_of, resolve, save_params
from diffusion_jax.formats.pipeline import (
  FOLDERS,
  Part,
  Pipeline,
  export_scheduler,
  read_part,
  read_pipeline,
  write_trained,
)
from diffusion_jax.formats.scheduler import Scheduler
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.pipelines.conditioners import (
  Conditioner,
  Context,
  ControlNet,
  Sizes,
  concatenated,
)
from diffusion_jax.pipelines.encoders import (
  IMAGE_ENCODER,
  MEAN,
  ROLES,
  STD,
  TEXT_KINDS,
  ImageEncoder,
  TextEncoders,
)
from diffusion_jax.pipelines.model import DENOISER, Diffusion, output_channels
from diffusion_jax.pipelines.sampling import PLACES, SampleConfig
from diffusion_jax.pipelines.spaces import AUTOENCODER, LatentSpace, Space
from diffusion_jax.registry import CONDITIONERS, NETWORKS, SPACES, load
from diffusion_jax.types import Params, Weights

ANY = 'Diffusion'
"""The class of models that no other layout has."""
EDITS = 'StableDiffusionInstructPix2PixPipeline'
"""The class of diffusers that is guided by its picture, too, with a scale of 1.5."""


def make_model(
  denoiser: Network, space: Space, conditioners: Mapping[str, Conditioner], noise: NoiseSchedule,
  parameterization: Parameterization, low_resolution: Schedule | None = None,
) -> Diffusion:
  """A model without weights. UserError where its parts do not fit together.

  Input channels of the denoiser that are neither z's nor taken by a conditioner are those of a
  picture, see `conditioners.CONCATENATED`; `low_resolution` has the noise levels of an upscaler's.
  """
  config = denoiser.config
  for conditioner in conditioners.values():
    wanted, width = getattr(config, 'cross_attention_dim', None), getattr(conditioner, 'width', 0)
    if width and wanted and width != wanted:
      raise UserError(
        f'unet.cross_attention_dim is {wanted}, but the text encoder gives texts of width {width}; '
        f'set it to {width}.'
      )
  channels, out = space.channels, output_channels(config)
  taken = getattr(config, 'in_channels', channels)
  if out not in (channels, 2 * channels) or taken < channels:
    raise UserError(
      f'the denoiser has {taken} input and {out} output channels, but what it is to denoise has '
      f'{channels}; set both to {channels}, or out_channels to {2 * channels} for a learned '
      'variance.'
    )
  label, rows = conditioners.get('class'), getattr(config, 'num_embeds_ada_norm', None)
  if label is not None and rows is not None and rows != len(label.classes):
    raise UserError(
      f'denoiser.num_embeds_ada_norm is {rows}, but there are {len(label.classes)} classes; set it '
      'to that.'
    )
  if getattr(config, 'addition_embed_type', None) == 'text_time':
    conditioners = {**conditioners, 'sizes': Sizes()}
  beside = taken - channels - sum(c.channels(space) for c in conditioners.values())
  conditioners = {**conditioners, **concatenated(space, beside, schedule=low_resolution)}
  return Diffusion(space, denoiser, conditioners, noise, parameterization)


def assemble(
  denoiser: Any, space: Any, conditioners: Mapping[str, Mapping[str, Any]],
  schedule: ScheduleConfig, parameterization: Parameterization, *, train: Any = None,
  dtype=jnp.float32,
) -> tuple[Diffusion, dict[str, Part]]:
  """A model of configs, and where the parts lie that are there already, by role.

  Args:
    denoiser: the config of a network of `registry.NETWORKS`.
    space: the `Config` of a row of `registry.SPACES`.
    conditioners: options of rows of `registry.CONDITIONERS`.
    train: the source that is trained on, of which conditioners may ask for the classes.

  Raises:
    UserError: a part cannot be read, or the parts do not fit together.
  """
  made, parts = space.build(dtype)
  context, told = Context(made, train, dtype), {}
  for name, options in conditioners.items():
    kind = load(CONDITIONERS, name, 'settings.conditioners')
    told[name], more = kind.build(options, context)
    parts |= more
  network = format_of(denoiser).network(denoiser, dtype=dtype)
  return make_model(network, made, told, NoiseSchedule.of(schedule), parameterization), parts


def read_model(
  path: str, dtype=jnp.float32
) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """Return the model of a directory or 'asset:NAME' without weights, its parts, how to sample.

  Args:
    dtype: of the computation.

  Raises:
    UserError: no such directory, no model in it, or a part that is missing or not implemented.
  """
  directory = resolve(path)
  if (directory / INDEX).is_file():
    index = read_json(inside(directory / INDEX, directory))
    if index.get('_class_name') == ANY:
      return _read_any(directory, index, dtype)
  pipeline = read_pipeline(path, _NAMES)
  parts = _networks(pipeline, path)
  scheduler = pipeline.scheduler()
  conditioners = {'text': _prompts(pipeline, parts, path, dtype)}
  if 'controlnet' in parts:
    conditioners['control'] = ControlNet(parts['controlnet'].network(dtype=dtype))
  low = 'low_res_scheduler'
  model = make_model(
    parts[DENOISER].network(dtype=dtype),
    LatentSpace(parts[AUTOENCODER].network(dtype=dtype), pipeline.latent_patch_size), conditioners,
    NoiseSchedule.of(scheduler.schedule),
    Parameterization(scheduler.prediction, scheduler.data_std),
    Schedule(pipeline.scheduler(low).schedule) if low in pipeline.parts else None,
  )
  return model, parts, _sample(pipeline, scheduler, path)


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
  """The parts that are networks, by the role of their weights."""
  found = {name: pipeline.parts[name] for name in _KINDS if name in pipeline.parts}
  if any(role in found for role in ROLES):
    found.pop(IMAGE_ENCODER, None)
  for name in ('unet', 'vae'):
    if name not in found:
      raise UserError(f'{resolve(path) / INDEX} names no {name}; give a text-to-image pipeline.')
  roles = {folder: role for role, folder in FOLDERS.items()}
  return {roles.get(name, name): part.expect(_KINDS[name]) for name, part in found.items()}


def _read_any(
  directory: Path, index: Mapping[str, Any], dtype
) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """What `save_any` has written."""
  def placed(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    place = lambda value: value if value.startswith('asset:') else str(
      inside(directory / value, directory)
    )
    return {k: place(str(v)) if k in kind.paths else v for k, v in options.items()}

  with reading(directory / INDEX, 'describes no model', 'export it again'):
    section = dict(index['space'])
    kind = load(SPACES, section.pop('type'), f'{directory / INDEX}: space')
    space = typed(kind.Config, placed(section, kind), 'space.')
    conditioners = {
      name: placed(options, load(CONDITIONERS, name, f'{directory / INDEX}: conditioners'))
      for name, options in index['conditioners'].items()
    }
    noise = typed(NoiseConfig, index['noise'], 'noise.')
    sample = typed(SampleConfig, index['sample'], 'sample.')
    prediction = Parameterization(index['prediction'], float(index['data_std']))
  denoiser = read_part(directory / DENOISER).expect(tuple(NETWORKS))
  model, parts = assemble(
    denoiser.config, space, conditioners, noise, prediction, dtype=dtype
  )
  return model, {DENOISER: denoiser, **parts}, sample


def _prompts(
  pipeline: Pipeline, parts: Mapping[str, Part], path: str, dtype
) -> TextEncoders | ImageEncoder:
  """The conditioner that reads the prompts of a model, or the picture in place of them."""
  roles = [role for role in ROLES if role in parts]
  if not roles and IMAGE_ENCODER in parts:
    extractor = pipeline.parts.get('feature_extractor', Part())
    pixels = pixel_statistics(*extractor.json('preprocessor_config.json'))
    return ImageEncoder(
      parts[IMAGE_ENCODER].network(dtype=dtype), pixels.get('mean', MEAN), pixels.get('std', STD)
    )
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
  if not pipeline.own:
    return sample_config(scheduler, pipeline.index.get('_class_name'))
  known = {field.name for field in dataclasses.fields(SampleConfig)}
  given = pipeline.index.get('sample', {})
  if isinstance(given, dict):  # Later versions may say more.
    given = {key: value for key, value in given.items() if key in known}
  try:
    return typed(SampleConfig, given, 'sample.')
  except UserError as error:
    raise UserError(f'{path} cannot be sampled: {error}') from error


def sample_config(scheduler: Scheduler, pipeline: str | None = None) -> SampleConfig:
  """How a pipeline of diffusers with this scheduler samples when it is told nothing else."""
  grid = dict(scheduler.grid)
  own = {name: grid.pop(name) for name in PLACES if name in grid}
  return SampleConfig(
    sampler=scheduler.sampler, options=dict(scheduler.options), spacing=scheduler.spacing,
    steps=50, guidance=7.5, image_guidance=1.5 if pipeline == EDITS else 1.0,
    threshold=scheduler.threshold, threshold_limit=scheduler.threshold_limit,
    threshold_percentile=scheduler.threshold_percentile, timesteps=scheduler.timesteps,
    scaled_noise=scheduler.scaled_noise, **own, places=grid,
  )


def scheduler_of(model: Diffusion, sample: SampleConfig) -> Scheduler:
  """Return what a scheduler_config.json says of a model that is sampled so."""
  plain = SampleConfig()
  grid = {name: getattr(sample, name) for name in PLACES}
  grid = {name: value for name, value in grid.items() if value != getattr(plain, name)}
  return Scheduler(
    model.noise.config, model.parameterization.name, sample.sampler, dict(sample.options),
    sample.spacing, grid | sample.places, sample.threshold, sample.threshold_limit,
    sample.threshold_percentile, sample.timesteps, sample.scaled_noise,
    model.parameterization.data_std,
  )


def load_model(
  path: str, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights, SampleConfig]:
  """Return `read_model` with the weights, tensor by tensor onto the mesh, or on the host."""
  model, parts, sample = read_model(path, dtype)
  return model, {role: part.load(mesh=mesh) for role, part in parts.items()}, sample


def save_model(
  directory: Path, model: Diffusion, denoiser: Params, *, autoencoder: str, clip: str,
  sample: SampleConfig, dtype: str,
) -> None:
  """Write a model that was trained here, with folders or assets for its frozen parts."""
  write_trained(
    directory, model.denoiser.config, denoiser, scheduler_of(model, sample),
    sample=dataclasses.asdict(sample), latent_patch_size=model.space.patch, autoencoder=autoencoder,
    clip=clip, dtype=dtype,
  )


def save_any(
  directory: Path, model: Diffusion, denoiser: Params, *, space: Any,
  conditioners: Mapping[str, Mapping[str, Any]], sample: SampleConfig, dtype: str,
) -> None:
  """Write any model of the registries, from the arguments of `assemble`; parts are copied."""
  save_params(directory / DENOISER, model.denoiser.config, denoiser, dtype=dtype)

  def kept(options: Mapping[str, Any], kind: Any, name: str) -> dict[str, Any]:
    out = dict(options)
    for key in kind.paths:
      if not out[key].startswith('asset:'):
        shutil.copytree(resolve(out[key]), directory / f'{name}_{key}', dirs_exist_ok=True)
        out[key] = f'{name}_{key}'
    return out

  kinds = {name: type(one) for name, one in model.conditioners.items()}
  config = model.noise.config
  write_json(directory / INDEX, {
    '_class_name': ANY, 'sample': dataclasses.asdict(sample),
    'space': {'type': model.space.name} | kept(untyped(space), type(model.space), 'space'),
    'conditioners': {
      name: kept({**options, **model.conditioners[name].options()}, kinds[name], name)
      for name, options in conditioners.items()
    },
    'noise': config.saved(), 'prediction': model.parameterization.name,
    'data_std': model.parameterization.data_std,
    **export_scheduler(directory, scheduler_of(model, sample)),
  })
