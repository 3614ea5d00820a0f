"""DINOv2 as features: FD-DINOv2 and its like (Stein et al. 2023)."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation.extractors.resize import resize
from diffusion_jax.formats.dinov2 import SIZES
from diffusion_jax.formats.networks import load_params, resolve
from diffusion_jax.models.network import Network
from diffusion_jax.models.vision.dinov2 import DINOv2, DINOv2Config
from diffusion_jax.types import Params

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1]."""

EDGE = 224
"""Of the images that the network is shown, whatever the size that it was trained at."""


def size_name(config: DINOv2Config) -> str:
  """'small', 'base', 'large' or 'giant', or the width and depth of a network of another size."""
  shape = lambda c: (c.hidden_size, c.num_hidden_layers)
  found = [name for name, known in SIZES.items() if shape(known) == shape(config)]
  name = found[0] if found else 'x'.join(map(str, shape(config)))
  return f'{name}-registers' if config.num_register_tokens else name


class DINOv2Extractor:
  """'cls' [b d]: the CLS token after the last norm.

  As the code of Stein et al. 2023 does unless told otherwise: images, whatever their shape, become
  224 x 224 by Pillow's bicubic rule on uint8, which rounds, and are normalised by ImageNet's mean
  and deviation.
  """

  def __init__(self, network: Network, params: Params, weights: str):
    self.name = f'dinov2/{size_name(network.config)}/{weights}/pillow'
    self.widths = {'cls': network.config.hidden_size}
    self.network, self.params = network, params
    patch = network.config.patch_size
    self.size, self.resizing = max(EDGE // patch, 1) * patch, 'pillow'

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 [b h w 3] -> {'cls': [b d]}."""
    mean, deviation = (np.asarray(values, np.float32) for values in (MEAN, STD))
    pixels = (resize(images, self.size, self.resizing) / 255 - mean) / deviation
    return {'cls': self.network.bind(params).encode_image(pixels).astype(jnp.float32)}


def load_dinov2_extractor(path: str | os.PathLike, *, mesh: Mesh | None = None) -> DINOv2Extractor:
  """The DINOv2 in a directory of config.json and model.safetensors.

  UserError where it cannot be read.
  """
  config, params = load_params('dinov2', path, mesh=mesh)
  return DINOv2Extractor(Network.of(DINOv2, config), params, resolve(path).resolve().name)
