"""OpenMoji's DiT by rectified flow, with the autoencoder and CLIP of the two recipes beside."""

from diffusion_jax.configs.openclipart.base import AUTOENCODER, CAPTIONS, CLIP, with_drawings
from diffusion_jax.configs.openmoji import dit_flow
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = with_drawings(dit_flow.get_config())
  config.settings.space.autoencoder = AUTOENCODER
  config.settings.update({'clip': CLIP, 'preview_captions': CAPTIONS})
  with config.settings.ignore_type():  # It was a bool.
    config.settings.cache = 'disk'
  config.loop.update({
    'total_steps': 1000, 'checkpoint_every_steps': 500, 'sample_every_steps': 500,
    'evaluate_samples': 512,
  })
  return config
