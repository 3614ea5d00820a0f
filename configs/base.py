"""The base of every config. A recipe takes it, states its task and changes what differs."""

import dataclasses

from ml_collections import ConfigDict

from diffusion_jax.config import DataConfig, TrainingConfig


def base(task: str) -> ConfigDict:
  """Return the defaults of all that tasks share; units stand in the names of the keys."""
  config = TrainingConfig(task, DataConfig('openmoji', size=64), settings={})
  values = dataclasses.asdict(config)
  del values['settings']
  return ConfigDict(values)
