"""Embeddings of images and texts by CLIP, in batches over the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diffusion_jax.evaluation.extractors import CLIPExtractor, compiled, load_clip_extractor
from diffusion_jax.formats.networks import resolve
from diffusion_jax.models.checks import require
from diffusion_jax.models.text.tokenizer import Cut, Tokenize, load_tokenizer
from diffusion_jax.parallel.mesh import in_batches

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def unit(x: Float[Array, 'n p']) -> Float[Array, 'n p']:
  """Scales rows to Euclidean length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def load_features(path: str, mesh: Mesh) -> CLIPFeatures:
  """The CLIP, both towers, in a directory or 'asset:NAME'. UserError where it cannot be read."""
  return CLIPFeatures(load_clip_extractor(path, mesh=mesh), load_tokenizer(resolve(path)), mesh)


class CLIPFeatures:
  """CLIP's embeddings of images and texts: projected, float32, not normalised.

  UserError for an image tower alone.
  """

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
    """uint8 [n h w 3] -> [n p]; other sizes than the tower's are resized (bicubic, antialiased)."""
    return self._run(self._embed_images, images)

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """Texts -> [n p]; longer ones than the context are cut."""
    return self._run(self._embed_texts, self._tokenize.batch(texts))
