"""What turns images into features, by name: Inception with each resize rule, CLIP; DINOv2 and
classifiers have files of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from diffusion_jax.backend.xla import jit
from diffusion_jax.evaluation.extractors_classifier import load_classifier_extractor
from diffusion_jax.evaluation.extractors_dinov2 import load_dinov2_extractor
from diffusion_jax.evaluation.resize import OF_INCEPTION, prepare, resize
from diffusion_jax.files import inside
from diffusion_jax.formats.inception import load_inception
from diffusion_jax.formats.networks import KINDS, load_params, resolve
from diffusion_jax.formats.preprocessor import read_pixels
from diffusion_jax.formats.tensors import read_json
from diffusion_jax.models.checks import require
from diffusion_jax.models.features.inception import SIZE
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIPConfig
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.types import Params


class Extractor(Protocol):
  """Images -> features, as a pure function of parameters.

  Attributes:
    name: tells features apart that must not be compared: network, file of weights, resize rule.
    widths: of each output by name.
    params: what `apply` computes with.
    size, resizing: edge of the images that the network sees, and the rule of `resize.RULES` that
      takes them there; images of 0-255 that have been resized so already, float32, stay as they
      are.
  """

  name: str
  widths: dict[str, int]
  params: Params
  size: int
  resizing: str

  def apply(
    self, params: Params, images: UInt8[Array, 'b h w 3']
  ) -> dict[str, Float[Array, 'b d']]:
    """Float32 features of uint8 images of any size. Pure, so it can be jitted and sharded."""
    ...


def compiled(extractor: Extractor) -> Callable[[Params, jax.Array], dict[str, jax.Array]]:
  """jax.jit of `apply`, with the options under which convolutions are quickest."""
  return jit(extractor.apply)


class InceptionExtractor:
  """The FID Inception behind one of `resize.OF_INCEPTION`.

  Outputs are those of `models.inception.Inception`. UserError for an output or a rule that it does
  not have.
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
    """uint8 [b h w 3] -> {output: [b d]}."""
    return self.network.bind(params)(prepare(images, SIZE, self.resizing), tuple(self.widths))


class CLIPExtractor:
  """CLIP's image tower with its projection: 'embedding' [b p], not normalised.

  Images are resized by PIL's bicubic rule with antialiasing, whatever their shape, to the tower's
  square. `has_texts` says whether the network also has a tower for texts.

  Args:
    clip: a CLIP, or a CLIPVisionModelWithProjection.
    mean, std: of each channel of the pixels in [0, 1]; the tower sees (pixel - mean) / std. The
      defaults, to [-1, 1], are those of the towers that are trained here.
  """

  def __init__(
    self, clip: Network, params: Params, weights: str, mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
  ):
    self.name = f'clip/{weights}/bicubic'
    self.widths = {'embedding': clip.config.projection_dim}
    self.network, self.params = clip, params
    self.has_texts = isinstance(clip.config, CLIPConfig)
    vision = clip.config.vision_config if self.has_texts else clip.config
    self.size, self.resizing = vision.image_size, 'clean'
    self._mean, self._std = (np.asarray(v, np.float32) * 255 for v in (mean, std))

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 [b h w 3] -> {'embedding': [b p]}."""
    pixels = (resize(images, self.size, self.resizing) - self._mean) / self._std
    return {'embedding': self.network.bind(params).encode_image(pixels).astype(jnp.float32)}


def load_clip_extractor(path: str | os.PathLike, *, mesh: Mesh | None = None) -> CLIPExtractor:
  """The CLIP in a directory or 'asset:NAME', or an image tower of one with its projection.

  Its preprocessor_config.json says mean and std. UserError where it cannot be read.
  """
  directory, kind = resolve(path), 'clip_vision_projection'
  if not KINDS[kind].describes(read_json(inside(directory / 'config.json', directory))):
    kind = 'clip'
  config, params = load_params(kind, path, mesh=mesh)
  file = directory / 'preprocessor_config.json'
  pixels = read_pixels(inside(file, directory)) if file.is_file() else {}
  network = Network.of(KINDS[kind].module, config)
  return CLIPExtractor(network, params, directory.resolve().name, **pixels)


def load_extractor(
  name: str, path: str | os.PathLike, *, outputs: Sequence[str] = (), mesh: Mesh | None = None
) -> Extractor:
  """An extractor of NAMES with the weights at a path, on the mesh, or on the host without one.

  Args:
    outputs: of Inception, which computes no further than it must; 'pool3' where none is named.

  Raises:
    UserError: no such extractor, weights that cannot be read, or an output it does not have.
  """
  family, _, resizing = name.partition('/')
  require(name in NAMES, f'There are no features {name!r}; choose of {", ".join(NAMES)}.')
  if family == 'inception':
    network, params = load_inception(path)
    made: Extractor = InceptionExtractor(
      network, params, Path(path).stem, resizing, outputs or ('pool3',)
    )
    made.params = params if mesh is None else put_params(params, mesh)
    return made
  made = _LOADERS[name](path, mesh=mesh)
  missing = sorted(set(outputs) - set(made.widths))
  require(not missing, f'{name} has no {", ".join(missing)}; choose of {", ".join(made.widths)}.')
  return made


_LOADERS = {
  'clip': load_clip_extractor, 'dinov2': load_dinov2_extractor,
  'classifier': load_classifier_extractor,
}
NAMES = (*(f'inception/{name}' for name in OF_INCEPTION), *_LOADERS)
"""What `load_extractor` knows."""
