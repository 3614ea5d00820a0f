"""The round of progressive distillation from 4 steps to 2."""

from diffusion_jax.configs.notes import progressive
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = progressive.get_config()
  config.settings.model = 'runs/notes/progressive/model'
  config.settings.distill.steps = config.settings.sample.steps = 2
  return config
