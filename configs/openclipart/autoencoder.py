"""The package's autoencoder of OpenMoji, trained on with drawings of all sizes."""

from diffusion_jax.configs.openclipart.base import with_drawings
from diffusion_jax.configs.openmoji import autoencoder
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = with_drawings(autoencoder.get_config())
  # Its latents are spread already: no growth of the KL's weight.
  config.settings.pretrained = 'asset:autoencoder-openmoji-64'
  config.settings.bottleneck.warmup_steps = 0
  config.loop.update({'total_steps': 1500, 'evaluate_samples': 512})
  return config
