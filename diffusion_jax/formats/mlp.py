"""config.json of our MLP, which no other library has."""

import dataclasses
from typing import Any

from diffusion_jax.formats.published import parse_config
from diffusion_jax.models.mlp import MLPConfig


def read_mlp(values: dict[str, Any], where: str) -> MLPConfig:
  """What `write_mlp` wrote."""
  return parse_config(MLPConfig, values, {}, where)


def write_mlp(config: MLPConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'MLP'}
