"""The autoencoder of OpenMoji's recipe, on drawings of all sizes."""

from diffusion_jax.configs.openclipart.base import with_drawings
from diffusion_jax.configs.openmoji import autoencoder
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = with_drawings(autoencoder.get_config())
  config.loop.evaluate_samples = 512
  return config
