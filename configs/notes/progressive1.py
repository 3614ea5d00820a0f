"""The round of progressive distillation from 2 steps to 1."""

from diffusion_jax.configs.notes import progressive
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = progressive.get_config()
  config.settings.model = 'runs/notes/progressive2/model'
  config.settings.distill.steps = config.settings.sample.steps = 1
  return config
