"""A classifier that was trained on one's own labels, as features where Inception means nothing."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from diffusion_jax.evaluation.extractors.resize import resize
from diffusion_jax.formats.networks import load_params, resolve
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Params


class ClassifierExtractor:
  """'penultimate' [b d], what the last layer sees, and 'logits' [b classes].

  Images of another size than in training are resized as training pictures are, by Pillow's bicubic
  rule with antialiasing, to a square. `class_names` says what the logits stand for.
  """

  def __init__(self, network: Network, params: Params, weights: str):
    config = network.config
    self.name = f'classifier/{weights}/clean'
    self.class_names = config.class_names
    self.widths = {'penultimate': config.block_out_channels[-1], 'logits': len(config.class_names)}
    self.network, self.params = network, params
    self.size, self.resizing = config.image_size, 'clean'

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 [b h w 3] -> {'penultimate': [b d], 'logits': [b classes]}, float32."""
    pixels = to_float(resize(images, self.size, self.resizing))
    features, logits = self.network.bind(params)(pixels)
    return {'penultimate': features, 'logits': logits}


def load_classifier_extractor(
  path: str | os.PathLike, *, mesh: Mesh | None = None
) -> ClassifierExtractor:
  """The classifier in a directory, such as WORKDIR/model of a run.

  UserError where it cannot be read.
  """
  config, params = load_params('classifier', path, mesh=mesh)
  directory = resolve(path).resolve()
  # Every run calls it model; the run's own name tells it from others.
  name = directory.parent.name if directory.name == 'model' else directory.name
  return ClassifierExtractor(Network.of(Classifier, config), params, name)
