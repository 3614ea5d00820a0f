"""The CLIP of OpenMoji's recipe, on drawings with captions of their folders and names."""

from diffusion_jax.configs.openclipart.base import with_drawings
from diffusion_jax.configs.openmoji import clip
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = with_drawings(clip.get_config())
  config.loop.evaluate_samples = 854  # All.
  return config
