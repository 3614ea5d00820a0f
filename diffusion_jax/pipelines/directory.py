"""A text-to-image model as a directory, as diffusers lays it out.

model_index.json names the class and the parts, each in a directory of its own. Beside the pipelines
of diffusers there is our own class, TextToImage, whose autoencoder and CLIP may be named as
'asset:NAME' instead.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import typed
from diffusion_jax.diffusion.noise import NoiseConfig, NoiseSchedule, Schedule, ScheduleConfig
from diffusion_jax.diffusion.parameterization import PREDICTIONS, Parameterization
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX, check_folder, inside
from diffusion_jax.formats.clip import read_pixels
from diffusion_jax.formats.networks import load_params, network_format, resolve, save_params
from diffusion_jax.formats.scheduler import Scheduler, read_scheduler
from diffusion_jax.formats.tensors import PICKLES, read_json, write_json
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.checks import shown
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.pipelines.conditioners import Conditioner, ControlNet, Sizes, concatenated
from diffusion_jax.pipelines.encoders import (
  IMAGE_ENCODER,
  MEAN,
  ROLES,
  STD,
  ImageEncoder,
  TextEncoders,
)
from diffusion_jax.pipelines.model import DENOISER, Diffusion, output_channels
from diffusion_jax.pipelines.sampling import PLACES, SampleConfig
from diffusion_jax.pipelines.spaces import AUTOENCODER, LatentSpace, Space
from diffusion_jax.types import Params, Weights

OURS = 'TextToImage'
MOST_PATCH = 64
FOLDERS = {AUTOENCODER: 'vae', DENOISER: 'unet'}
"""Of diffusers, where they are not called as the roles here."""
TEXT_KINDS = ('clip_text_projection', 'clip_text', 'clip')
EDITS = 'StableDiffusionInstructPix2PixPipeline'
"""The class of diffusers that is guided by its picture, too, with a scale of 1.5."""


@dataclasses.dataclass(frozen=True)
class Part:
  """One network of a model: its kind, its config, and where its weights are."""

  kind: str
  config: Any
  path: str

  def network(self, dtype) -> Network:
    """Without weights."""
    return network_format(self.kind).network(self.config, dtype=dtype)


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
  if getattr(config, 'addition_embed_type', None) == 'text_time':
    conditioners = {**conditioners, 'sizes': Sizes()}
  beside = taken - channels - sum(c.channels(space) for c in conditioners.values())
  conditioners = {**conditioners, **concatenated(space, beside, schedule=low_resolution)}
  return Diffusion(space, denoiser, conditioners, noise, parameterization)


def assemble(
  unet: UNetConfig, autoencoder: str, clip: str, schedule: ScheduleConfig,
  parameterization: Parameterization, latent_patch_size: int = 1, dtype=jnp.float32,
) -> tuple[Diffusion, Weights]:
  """A model of a U-Net without weights and of two loaded, frozen parts.

  Returns:
    The model, and host parameters {'autoencoder': ..., 'text_encoder': ...}.

  Raises:
    UserError: a part cannot be read, or the parts do not fit together.
  """
  space, frozen = load_latent_space(autoencoder, latent_patch_size, dtype)
  text, weights = load_text_encoder(clip, dtype)
  model = make_model(
    Network.of(UNet, unet, dtype=dtype), space, {'text': text}, NoiseSchedule.of(schedule),
    parameterization,
  )
  return model, frozen | weights


def load_latent_space(
  path: str, patch: int = 1, dtype=jnp.float32
) -> tuple[LatentSpace, Weights]:
  """The latents of the autoencoder in a directory, or 'asset:NAME', and its host parameters."""
  check_folder(resolve(path))  # It is copied beside what is trained, at the end.
  config, params = load_params('autoencoder', path)
  network = Network.of(AutoencoderKL, config, dtype=dtype)
  return LatentSpace(network, patch), {AUTOENCODER: params}


def load_text_encoder(path: str, dtype=jnp.float32) -> tuple[TextEncoders, Weights]:
  """The text tower of a CLIP with its tokenizer, and its host parameters."""
  check_folder(resolve(path))
  part = read_part(path, TEXT_KINDS)
  params = load_params(part.kind, path)[1]
  text = TextEncoders({ROLES[0]: part.network(dtype)}, (load_tokenizer(resolve(path)),))
  return text, {ROLES[0]: params}


def read_part(path: str, kinds: tuple[str, ...]) -> Part:
  """The first of `kinds` that a directory's config.json describes. UserError where none does."""
  file = resolve(path) / 'config.json'
  values = read_json(inside(file, file.parent))
  for name in kinds:
    spec = network_format(name)
    if spec.matches(values):
      return Part(name, spec.parse(values, str(file)), path)
  raise UserError(f'{file} describes none of {", ".join(kinds)}; check which network it is.')


def read_pipeline(
  path: str, dtype=jnp.float32
) -> tuple[Diffusion, dict[str, Part], SampleConfig]:
  """The model of a directory, or 'asset:NAME', without its weights; where they are; how to sample.

  Raises:
    UserError: no such directory, no model in it, or a part that is missing or not implemented.
  """
  directory = resolve(path)
  if directory.suffix == '.safetensors' and directory.is_file():
    raise UserError(
      f'{path} is a single file, which holds no tokenizer; make a directory of it: python -m '
      f'diffusion_jax convert --from {path} --to DIR --layout diffusers --tokenizer DIR.'
    )
  if not (directory / INDEX).is_file():
    raise UserError(
      f'{path} is no text-to-image model: it has no {INDEX}; give a directory that train or '
      'convert wrote, or a pipeline of diffusers.'
    )
  index = read_json(inside(directory / INDEX, directory))
  ours = index.get('_class_name') == OURS
  parts = _parts(directory, index, ours)
  schedule, prediction, sample = _scheduler(directory, index, ours)
  conditioners = {'text': _prompts(path, directory, index, parts, dtype)}
  if 'controlnet' in parts:
    conditioners['control'] = ControlNet(parts['controlnet'].network(dtype))
  low = directory / 'low_res_scheduler' / 'scheduler_config.json'
  model = make_model(
    parts[DENOISER].network(dtype),
    LatentSpace(parts[AUTOENCODER].network(dtype), _patch(path, index)), conditioners,
    NoiseSchedule.of(schedule), Parameterization(prediction),
    Schedule(_read_scheduler(low).schedule) if low.is_file() else None,
  )
  return model, parts, sample


def _prompts(
  path: str, directory: Path, index: Mapping[str, Any], parts: Mapping[str, Part], dtype
) -> TextEncoders | ImageEncoder:
  """The conditioner that reads the prompts of a model, or the picture in place of them."""
  roles = [role for role in ROLES if role in parts]
  if not roles and IMAGE_ENCODER in parts:
    file = directory / 'feature_extractor' / 'preprocessor_config.json'
    pixels = read_pixels(inside(file, directory)) if file.is_file() else {}
    mean, std = pixels.get('mean', MEAN), pixels.get('std', STD)
    return ImageEncoder(parts[IMAGE_ENCODER].network(dtype), mean, std)
  if not roles:
    raise UserError(f'{path} has no text encoder; give a text-to-image model.')
  ours = index.get('_class_name') == OURS
  places = [resolve(parts[roles[0]].path)] if ours else [
    directory / role.replace('text_encoder', 'tokenizer') for role in roles
  ]
  sdxl = len(roles) > 1
  return TextEncoders(
    {role: parts[role].network(dtype) for role in roles}, tuple(map(load_tokenizer, places)),
    skip=int(sdxl), normalize=not sdxl, pooled=sdxl,
    zero_null=bool(index.get('force_zeros_for_empty_prompt', sdxl)) and sdxl,
  )


def _parts(directory: Path, index: Mapping[str, Any], ours: bool) -> dict[str, Part]:
  place = lambda role: str(directory / role)
  if ours:
    named = lambda role: str(index.get(role, role))
    ours_at = lambda role: named(role) if named(role).startswith('asset:') else place(role)
    return {
      DENOISER: read_part(place('unet'), ('unet',)),
      'autoencoder': read_part(ours_at('autoencoder'), ('autoencoder',)),
      ROLES[0]: read_part(ours_at('clip'), TEXT_KINDS),
    }
  kinds = {'unet': ('unet',), 'vae': ('autoencoder',), 'controlnet': ('controlnet',)}
  kinds |= dict.fromkeys(ROLES, TEXT_KINDS)
  if not any(_has(index, role) for role in ROLES):
    kinds[IMAGE_ENCODER] = ('clip_vision_projection',)
  found = {
    role: read_part(place(role), names) for role, names in kinds.items() if _has(index, role)
  }
  for role in ('unet', 'vae'):
    if role not in found:
      raise UserError(f'{directory / INDEX} names no {role}; give a text-to-image pipeline.')
  found[AUTOENCODER] = found.pop('vae')
  found[DENOISER] = found.pop('unet')
  return found


def _has(index: Mapping[str, Any], role: str) -> bool:
  """diffusers names an absent part [null, null]."""
  entry = index.get(role)
  return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def _scheduler(directory: Path, index: Mapping[str, Any], ours: bool):
  """(schedule, prediction, how to sample) of a model directory."""
  file = directory / 'scheduler' / 'scheduler_config.json'
  if not ours:
    found = _read_scheduler(file)
    return found.schedule, found.prediction, sample_config(found, index.get('_class_name'))
  scheduler = read_json(inside(file, directory))
  prediction = scheduler.get('prediction_type', 'epsilon')
  if not isinstance(prediction, str) or prediction not in PREDICTIONS:
    raise UserError(
      f'{directory} predicts {shown(prediction)}; only {", ".join(PREDICTIONS)} are known.'
    )
  known = {field.name for field in dataclasses.fields(SampleConfig)}
  try:
    given = index.get('sample', {})
    if isinstance(given, dict):
      given = {k: v for k, v in given.items() if k in known}
    return _schedule_config(scheduler), prediction, typed(SampleConfig, given, 'sample.')
  except UserError as error:
    raise UserError(f'{directory} cannot be sampled: {error}') from error


def _read_scheduler(file: Path) -> Scheduler:
  return read_scheduler(read_json(inside(file, file.parent)), str(file))


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


def _schedule_config(values: Mapping[str, Any]) -> NoiseConfig:
  fields = {field.name for field in dataclasses.fields(NoiseConfig)}
  return typed(NoiseConfig, {k: v for k, v in values.items() if k in fields}, 'schedule.')


def _patch(path: str, index: Mapping[str, Any]) -> int:
  patch = index.get('latent_patch_size', 1)
  if type(patch) is not int or not 1 <= patch <= MOST_PATCH:
    raise UserError(f'{path} has latent_patch_size {shown(patch)}; give 1 to {MOST_PATCH}.')
  return patch


def load_weights(
  parts: Mapping[str, Part], *, dtype=jnp.float32, mesh: Mesh | None = None
) -> Weights:
  """The parameters of every part, tensor by tensor onto the mesh, or on the host."""
  return {
    role: load_params(part.kind, part.path, dtype=dtype, mesh=mesh)[1]
    for role, part in parts.items()
  }


def load_text_to_image(
  path: str, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Diffusion, Weights, SampleConfig]:
  """Reads a model directory, or 'asset:NAME'. `dtype` is the type of the computation.

  Raises:
    UserError: no such directory, no model in it, or a part that cannot be read.
  """
  model, parts, sample = read_pipeline(path, dtype)
  return model, load_weights(parts, mesh=mesh), sample


def save_text_to_image(
  directory: Path, model: Diffusion, denoiser: Params, *, autoencoder: str, clip: str,
  sample: SampleConfig, dtype: str,
) -> None:
  """Writes a model of our own class; `load_text_to_image` reads it."""
  save_params(directory / 'unet', model.denoiser.config, denoiser, dtype=dtype)
  scheduler = {
    '_class_name': 'DDIMScheduler', **model.noise.config.saved(),
    'prediction_type': model.parameterization.name, 'timestep_spacing': sample.spacing,
    'clip_sample': False, 'set_alpha_to_one': True, 'steps_offset': 0,
  }
  write_json(directory / 'scheduler' / 'scheduler_config.json', scheduler)
  index = {
    '_class_name': OURS, 'sample': dataclasses.asdict(sample),
    'latent_patch_size': model.space.patch,
  }
  for role, path in (('autoencoder', autoencoder), ('clip', clip)):
    index[role] = path if path.startswith('asset:') else role
    if index[role] == role:
      shutil.copytree(resolve(path), directory / role, dirs_exist_ok=True)
  write_json(directory / INDEX, index)


def save_changed(
  directory: Path, source: str, changed: Mapping[str, tuple[Any, Params]], dtype: str
) -> None:
  """A copy of the pipeline in `source`, with other parameters (config, params) for some roles.

  Single files of weights that lie beside the parts are of the old model and left behind.
  """
  skip = {FOLDERS.get(role, role) for role in changed}
  origin = resolve(source)

  def ignore(folder: str, names: list[str]) -> set[str]:
    if Path(folder) != origin:
      return set()
    weights = {name for name in names if Path(name).suffix in ('.safetensors', *PICKLES)}
    return (skip & set(names)) | weights | {name for name in names if name.startswith('.')}

  check_folder(origin)
  shutil.copytree(origin, directory, ignore=ignore, dirs_exist_ok=True)
  for role, (config, params) in changed.items():
    save_params(directory / FOLDERS.get(role, role), config, params, dtype=dtype)
