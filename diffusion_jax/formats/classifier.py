"""config.json of our classifier, which no other library has."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import require
from diffusion_jax.formats.published import NetworkFormat
from diffusion_jax.models.vision.classifier import Classifier, ClassifierConfig


class _ClassifierFormat(NetworkFormat):
  """Only one that is trained has classes, which training finds in its data."""

  def parse(self, values: Mapping[str, Any], where: str) -> ClassifierConfig:
    config = super().parse(values, where)
    require(bool(config.class_names), f'{where}: class_names is empty; a classifier has classes.')
    return config


CLASSIFIER = _ClassifierFormat(Classifier, ClassifierConfig, ('Classifier',))
