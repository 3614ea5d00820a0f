"""Features of images alone: the FID Inception by each tool's resize rule, DINOv2, a classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import require
from diffusion_jax.evaluation.extractors.resize import OF_INCEPTION, prepare, resize
from diffusion_jax.formats.dinov2 import SIZES
from diffusion_jax.formats.inception import load_inception
from diffusion_jax.formats.networks import load_params, resolve
from diffusion_jax.models.features.inception import SIZE
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.classifier import Classifier
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Params


class InceptionExtractor:
  """The FID Inception behind one of `resize.OF_INCEPTION`; outputs of `features.inception`.

  UserError for an unknown output or rule.
  """

  def __init__(
    self, network: Network, params: Params, weights: str, resizing: str = 'tensorflow',
    outputs: Sequence[str] = ('pool3',),
  ):
    require(
      resizing in OF_INCEPTION,
      f'Inception has no resize rule {resizing!r}; choose of {", ".join(OF_INCEPTION)}.',
    )
    known = network.config.widths
    for output in outputs:
      require(output in known, f'Inception has no {output!r}; choose of {", ".join(known)}.')
    self.name = f'inception/{weights}/{resizing}'
    self.widths = {output: known[output] for output in outputs}
    self.network, self.params = network, params
    self.size, self.resizing = SIZE, resizing

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    return self.network.bind(params)(prepare(images, SIZE, self.resizing), tuple(self.widths))


def load_inception_extractor(
  path: str | os.PathLike, rule: str, outputs: Sequence[str], *, mesh: Mesh | None = None
) -> InceptionExtractor:
  """Load the Inception in a file. UserError where it cannot be read or lacks an output."""
  network, params = load_inception(path)
  params = params if mesh is None else put_params(params, mesh)
  return InceptionExtractor(network, params, Path(path).stem, rule, outputs)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels in [0, 1]."""

EDGE = 224
"""Edge of the images that the network sees, whatever the size that it was trained at."""


def size_name(config: DINOv2Config) -> str:
  """Return 'small', 'base', 'large' or 'giant', or width and depth of a network of another size."""
  shape = lambda c: (c.hidden_size, c.num_hidden_layers)
  found = [name for name, known in SIZES.items() if shape(known) == shape(config)]
  name = found[0] if found else 'x'.join(map(str, shape(config)))
  return f'{name}-registers' if config.num_register_tokens else name


class DINOv2Extractor:
  """'cls' [b d]: the CLS token after the last norm.

  As the code of Stein et al. 2023 by default: images of any shape become 224 x 224 by Pillow's
  bicubic rule on uint8, normalised by ImageNet's mean and deviation.
  """

  def __init__(self, network: Network, params: Params, weights: str):
    self.name = f'dinov2/{size_name(network.config)}/{weights}/pillow'
    self.widths = {'cls': network.config.hidden_size}
    self.network, self.params = network, params
    patch = network.config.patch_size
    self.size, self.resizing = max(EDGE // patch, 1) * patch, 'pillow'

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    mean, deviation = (np.asarray(values, np.float32) for values in (MEAN, STD))
    pixels = (resize(images, self.size, self.resizing) / 255 - mean) / deviation
    return {'cls': self.network.bind(params).encode_image(pixels).astype(jnp.float32)}


def load_dinov2_extractor(path: str | os.PathLike, *, mesh: Mesh | None = None) -> DINOv2Extractor:
  """Load the DINOv2 in a directory. UserError where it cannot be read."""
  config, params = load_params('dinov2', path, mesh=mesh)
  return DINOv2Extractor(Network.of(DINOv2, config), params, resolve(path).resolve().name)


class ClassifierExtractor:
  """'penultimate' [b d], before the last layer, and 'logits' [b classes], of `class_names`.

  Images of another size are resized to a square by Pillow's antialiased bicubic rule, as in
  training.
  """

  def __init__(self, network: Network, params: Params, weights: str):
    config = network.config
    self.name = f'classifier/{weights}/clean'
    self.class_names = config.class_names
    self.widths = {'penultimate': config.block_out_channels[-1], 'logits': len(config.class_names)}
    self.network, self.params = network, params
    self.size, self.resizing = config.image_size, 'clean'

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    pixels = to_float(resize(images, self.size, self.resizing))
    features, logits = self.network.bind(params)(pixels)
    return {'penultimate': features, 'logits': logits}


def load_classifier_extractor(
  path: str | os.PathLike, *, mesh: Mesh | None = None
) -> ClassifierExtractor:
  """Load the classifier in a directory, such as WORKDIR/model. UserError where it cannot be."""
  config, params = load_params('classifier', path, mesh=mesh)
  require(
    not config.noised,
    f'{path} is a classifier of noised {config.noised}, whose features are of no pictures; give '
    'one of clean images.',
  )
  directory = resolve(path).resolve()
  # Every run calls it model; the run's own name tells it from others.
  name = directory.parent.name if directory.name == 'model' else directory.name
  return ClassifierExtractor(Network.of(Classifier, config), params, name)
