"""OpenMoji's quickstart with the autoencoder and CLIP of the two recipes beside this one."""

from diffusion_jax.configs.openclipart.base import AUTOENCODER, CAPTIONS, CLIP, with_drawings
from diffusion_jax.configs.openmoji import quickstart
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = with_drawings(quickstart.get_config())
  config.settings.update({
    'autoencoder': AUTOENCODER, 'clip': CLIP, 'preview_captions': CAPTIONS,
  })
  with config.settings.ignore_type():  # It was a bool.
    config.settings.cache = 'disk'
  config.loop.evaluate_samples = 512
  return config
