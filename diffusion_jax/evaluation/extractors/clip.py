"""Embeddings of images and texts by CLIP, in batches over the mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.errors import require
from diffusion_jax.evaluation.extract import column
from diffusion_jax.evaluation.extractors import Extractor, compiled
from diffusion_jax.evaluation.extractors.resize import resize
from diffusion_jax.files import inside
from diffusion_jax.formats.clip import HALF, PREPROCESSOR, pixel_statistics
from diffusion_jax.formats.networks import load_params, network_format, resolve
from diffusion_jax.formats.tensors import read_json
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIPConfig
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, load_tokenizer
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.types import Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def load_features(path: str, mesh: Mesh) -> CLIPFeatures:
  """Load the CLIP, both towers, in a directory or 'asset:NAME'. UserError where it cannot be."""
  return CLIPFeatures(load_clip_extractor(path, mesh=mesh), load_tokenizer(resolve(path)), mesh)


class CLIPExtractor:
  """CLIP's image tower with its projection: 'embedding' [b p], not normalised.

  Images of any shape are resized to the tower's square by PIL's antialiased bicubic rule.
  `has_texts` says whether there is a text tower. clip: a CLIP or CLIPVisionModelWithProjection.
  mean, std: per channel of pixels in [0, 1]; the tower sees (pixel - mean) / std, by default
  [-1, 1], as the towers trained here.
  """

  def __init__(
    self, clip: Network, params: Params, weights: str, mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
  ):
    self.name = f'clip/{weights}/bicubic'
    self.widths = {'embedding': clip.config.projection_dim}
    self.network, self.params = clip, params
    self.has_texts = isinstance(clip.config, CLIPConfig)
    vision = clip.config.vision_config if self.has_texts else clip.config
    self.size, self.resizing = vision.image_size, 'clean'
    self.pixels = {'mean': tuple(mean), 'std': tuple(std)}
    self._mean, self._std = (np.asarray(v, np.float32) * 255 for v in (mean, std))

  def apply(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    pixels = (resize(images, self.size, self.resizing) - self._mean) / self._std
    return {'embedding': self.network.bind(params).encode_image(pixels).astype(jnp.float32)}


def load_clip_extractor(path: str | os.PathLike, *, mesh: Mesh | None = None) -> CLIPExtractor:
  """The CLIP, or image tower with projection, in a directory or 'asset:NAME'; or UserError.

  mean and std are those of its preprocessor_config.json.
  """
  directory, kind = resolve(path), 'clip_vision_projection'
  if not network_format(kind).matches(read_json(inside(directory / 'config.json', directory))):
    kind = 'clip'
  config, params = load_params(kind, path, mesh=mesh)
  file = directory / PREPROCESSOR
  pixels = pixel_statistics(read_json(inside(file, directory)), str(file)) if file.is_file() else {}
  network = network_format(kind).network(config)
  return CLIPExtractor(network, params, directory.resolve().name, **pixels)


class CLIPFeatures:
  """CLIP's projected embeddings of images and texts, float32, not normalised; or UserError."""

  def __init__(
    self, extractor: CLIPExtractor, tokenizer: PreTrainedTokenizerBase, mesh: Mesh,
    batch_size: int = 64,
  ):
    require(
      extractor.has_texts,
      f'{extractor.name} is an image tower alone and knows no texts; give a CLIP with both towers.',
    )
    self.extractor, self.mesh, self.batch_size = extractor, mesh, batch_size
    clip = extractor.network
    length = clip.config.text_config.max_position_embeddings
    self._tokenize = Tokenize(tokenizer, length, cut=Cut(reader=extractor.name))
    self._embed_images = compiled(extractor)
    self._embed_texts = jax.jit(
      lambda params, ids: {'embedding': clip.bind(params).encode_text(ids)[1].astype(jnp.float32)}
    )

  def _run(self, function, values: np.ndarray) -> np.ndarray:
    batches = in_batches(
      function, self.extractor.params, values, mesh=self.mesh, batch_size=self.batch_size
    )
    return np.concatenate([batch['embedding'] for batch in batches])

  def images(self, images: np.ndarray) -> np.ndarray:
    """Return [n p] of uint8 [n h w 3], resized to the tower's size (bicubic, antialiased)."""
    return self._run(self._embed_images, images)

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """Return [n p] of texts; longer ones than the context are cut."""
    return self._run(self._embed_texts, self._tokenize.batch(texts))


def text_towers(
  named: Sequence[str], extractors: Sequence[Extractor], mesh: Mesh
) -> dict[str, CLIPFeatures]:
  """Return, by column, what embeds captions for it: every CLIP with a text tower."""
  found = {}
  for text, extractor in zip(named, extractors, strict=True):
    kind, _, path = text.partition(':')
    if kind == 'clip' and extractor.has_texts:
      found[column(extractor, 'embedding')] = CLIPFeatures(
        extractor, load_tokenizer(resolve(path)), mesh
      )
  return found
