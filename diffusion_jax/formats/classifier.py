"""config.json of our classifier, which no other library has."""

import dataclasses
from typing import Any

from diffusion_jax.formats.published import parse_config
from diffusion_jax.models.checks import require
from diffusion_jax.models.vision.classifier import ClassifierConfig


def read_classifier(values: dict[str, Any], where: str) -> ClassifierConfig:
  """What `write_classifier` wrote."""
  config = parse_config(ClassifierConfig, values, {}, where)
  require(bool(config.class_names), f'{where}: class_names is empty; a classifier has classes.')
  return config


def write_classifier(config: ClassifierConfig) -> dict[str, Any]:
  return dataclasses.asdict(config) | {'_class_name': 'Classifier'}
