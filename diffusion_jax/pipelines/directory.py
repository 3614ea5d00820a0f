"""A text-to-image model as a directory, in diffusers' spirit.

model_index.json names the parts, unet/ and scheduler/ are in diffusers' layout. Autoencoder and
CLIP are copied beside them, or, where they come with the package, named as 'asset:NAME'.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.diffusion.denoiser import PREDICTIONS
from diffusion_jax.diffusion.schedules import Schedule, ScheduleConfig
from diffusion_jax.errors import UserError
from diffusion_jax.io.pretrained import load_params, resolve, save_params
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.functional import Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.unet_config import UNetConfig
from diffusion_jax.pipelines.text_to_image import SampleConfig, TextToImage, Weights
from diffusion_jax.types import Params

INDEX = 'model_index.json'


def assemble(
  unet: UNetConfig, autoencoder: str, clip: str, schedule: ScheduleConfig, prediction: str,
  latent_patch_size: int = 1, dtype=jnp.float32,
) -> tuple[TextToImage, dict[str, Params]]:
  """A model of a U-Net without weights and of two loaded, frozen parts.

  Returns:
    The model, and host parameters {'autoencoder': ..., 'clip': ...}.

  Raises:
    UserError: a part cannot be read, or the parts do not fit together.
  """
  autoencoder_config, autoencoder_params = load_params('autoencoder', autoencoder)
  clip_config, clip_params = load_params('clip', clip)
  width = clip_config.text_config.hidden_size
  if unet.cross_attention_dim != width:
    raise UserError(
      f'unet.cross_attention_dim is {unet.cross_attention_dim}, but {clip} gives texts of width '
      f'{width}; set it to {width}.'
    )
  channels = autoencoder_config.latent_channels * latent_patch_size**2
  if unet.in_channels != channels or unet.out_channels not in (channels, 2 * channels):
    raise UserError(
      f'the U-Net has {unet.in_channels} input and {unet.out_channels} output channels, but '
      f'latents of {autoencoder}, folded {latent_patch_size} x {latent_patch_size}, have '
      f'{channels}; set both to {channels}, or out_channels to {2 * channels} for a learned '
      'variance.'
    )
  model = TextToImage(
    unet=Network.of(UNet, unet, dtype=dtype),
    autoencoder=Network.of(AutoencoderKL, autoencoder_config, dtype=dtype),
    clip=Network.of(CLIP, clip_config, dtype=dtype),
    schedule=Schedule(schedule), prediction=prediction, tokenizer=load_tokenizer(resolve(clip)),
    latent_patch_size=latent_patch_size,
  )
  return model, {'autoencoder': autoencoder_params, 'clip': clip_params}


def save_text_to_image(
  directory: Path, model: TextToImage, unet: Params, *, autoencoder: str, clip: str,
  sample: SampleConfig, dtype: str,
) -> None:
  """Writes the model; `load_text_to_image` reads it."""
  save_params(directory / 'unet', model.unet.config, unet, dtype=dtype)
  scheduler = {
    '_class_name': 'DDIMScheduler', **dataclasses.asdict(model.schedule.config),
    'prediction_type': model.prediction, 'timestep_spacing': sample.spacing,
    'clip_sample': False, 'set_alpha_to_one': True, 'steps_offset': 0,
  }
  _write_json(directory / 'scheduler' / 'scheduler_config.json', scheduler)
  index = {
    '_class_name': 'TextToImage', 'sample': dataclasses.asdict(sample),
    'latent_patch_size': model.latent_patch_size,
  }
  for role, path in (('autoencoder', autoencoder), ('clip', clip)):
    index[role] = path if path.startswith('asset:') else role
    if index[role] == role:
      shutil.copytree(resolve(path), directory / role, dirs_exist_ok=True)
  _write_json(directory / INDEX, index)


def load_text_to_image(path: str, dtype=jnp.float32) -> tuple[TextToImage, Weights, SampleConfig]:
  """Reads a model directory, or 'asset:NAME'; parameters are float32 host arrays.

  Raises:
    UserError: no such directory, no model in it, or a part that cannot be read.
  """
  directory = resolve(path)
  index = _read_json(directory / INDEX, f'{path} is no text-to-image model')
  scheduler = _read_json(directory / 'scheduler' / 'scheduler_config.json', f'{path} is incomplete')
  parts = {
    role: part if part.startswith('asset:') else str(directory / role)
    for role, part in ((role, str(index.get(role, role))) for role in ('autoencoder', 'clip'))
  }
  fields = {field.name for field in dataclasses.fields(ScheduleConfig)}
  schedule = ScheduleConfig(**{k: v for k, v in scheduler.items() if k in fields})
  prediction = scheduler.get('prediction_type', 'epsilon')
  if prediction not in PREDICTIONS:
    raise UserError(f'{path} predicts {prediction!r}; only {", ".join(PREDICTIONS)} are known.')
  patch = index.get('latent_patch_size', 1)
  if type(patch) is not int or patch < 1:
    raise UserError(f'{path} has latent_patch_size {patch!r}; give a number from 1 on.')
  unet_config, unet = load_params('unet', str(directory / 'unet'))
  model, frozen = assemble(unet_config, **parts, schedule=schedule, prediction=prediction,
                           latent_patch_size=patch, dtype=dtype)
  known = {field.name for field in dataclasses.fields(SampleConfig)}
  given = {k: v for k, v in index.get('sample', {}).items() if k in known}
  try:
    sample = typed(SampleConfig, given, 'sample.')
  except UserError as error:
    raise UserError(f'{path} cannot be sampled: {error}') from error
  to_arrays = lambda params: {name: np.asarray(value) for name, value in params.items()}
  weights = Weights(*map(to_arrays, (unet, frozen['autoencoder'], frozen['clip'])))
  return model, weights, sample


def _write_json(path: Path, values: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(values, indent=2) + '\n')


def _read_json(path: Path, problem: str) -> dict:
  try:
    values = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f'{problem}: {path} is missing; give a directory that train wrote.') from None
  except (OSError, ValueError) as error:
    raise UserError(f'{problem}: {path} cannot be read ({error}); export it again.') from error
  if not isinstance(values, dict):
    raise UserError(f'{problem}: {path} holds no JSON object; export it again.')
  return values
