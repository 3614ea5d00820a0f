"""The one size of the pictures of a config, `data.size`: what else states a size must agree."""

from typing import Any

import numpy as np

from diffusion_jax.data.transforms import check_transforms
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import read_config
from diffusion_jax.pipelines.directory import read_pipeline
from diffusion_jax.recipe import LATENT, TrainingConfig


def check_sizes(config: TrainingConfig) -> None:
  """Whether all sizes in a config are `data.size`, before any data are read.

  UserError for the first that is not, with both values.
  """
  if config.task == 'toy':
    return
  _CHECKS[config.task](config.settings, config.data.size)
  if not (config.task in LATENT and config.settings.cache):
    check_transforms(config.data.transforms, config.data.size)


def _same(key: str, value: int, size: int) -> None:
  if value != size:
    raise UserError(f'data.size is {size}, but {key} is {value}; set both alike.')


def _autoencoder(settings: Any, size: int) -> None:
  config = settings.autoencoder
  given = config.sample_size
  for edge in () if given is None else np.ravel(given):
    _same('settings.autoencoder.sample_size', int(edge), size)
  if size % config.factor:
    raise UserError(
      f'data.size is {size}, but the autoencoder halves pictures to 1/{config.factor}; choose a '
      f'multiple of {config.factor}, or other settings.autoencoder.block_out_channels.'
    )


def _classifier(settings: Any, size: int) -> None:
  _same('settings.classifier.image_size', settings.classifier.image_size, size)


def _clip(settings: Any, size: int) -> None:
  _same('settings.clip.vision_config.image_size', settings.clip.vision_config.image_size, size)


def _diffusion(settings: Any, size: int) -> None:
  factor = settings.latent_patch_size * read_config('autoencoder', settings.autoencoder).factor
  sample_size = settings.unet.sample_size
  if size != sample_size * factor:
    raise UserError(
      f'data.size {size} gives latents of {size / factor:g}, but sample_size of the U-Net is '
      f'{sample_size}; set data.size to {sample_size * factor} or sample_size to '
      f'{size // factor}.'
    )


def _finetune(settings: Any, size: int) -> None:
  if not settings.model:
    return  # Which says more when it is opened.
  model = read_pipeline(settings.model)[0]
  if size != model.image_size:
    raise UserError(
      f'data.size is {size}, but {settings.model} draws {model.image_size} pixels (sample_size of '
      f'its U-Net is {model.unet.config.sample_size}); set data.size to {model.image_size}.'
    )


_CHECKS = {
  'autoencoder': _autoencoder, 'classifier': _classifier, 'clip': _clip, 'diffusion': _diffusion,
  'finetune': _finetune,
}
