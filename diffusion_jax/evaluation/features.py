"""Embeddings of images and texts by CLIP, in batches over the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diffusion_jax.io.pretrained import load_params, resolve
from diffusion_jax.models.functional import Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.models.text.tokenizer import Tokenize, load_tokenizer
from diffusion_jax.parallel.sharding import in_batches
from diffusion_jax.types import Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


def unit(x: Float[Array, 'n p']) -> Float[Array, 'n p']:
  """Scales rows to Euclidean length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def load_features(path: str, mesh: Mesh) -> CLIPFeatures:
  """The CLIP, both towers, in a directory or 'asset:NAME'. UserError where it cannot be read."""
  config, params = load_params('clip', path, mesh=mesh)
  return CLIPFeatures(Network.of(CLIP, config), params, load_tokenizer(resolve(path)), mesh)


class CLIPFeatures:
  """CLIP as a feature extractor. Embeddings are projected, float32, not normalised."""

  def __init__(
    self, clip: Network, params: Params, tokenizer: PreTrainedTokenizerBase, mesh: Mesh,
    batch_size: int = 64,
  ):
    self.params, self.mesh, self.batch_size = params, mesh, batch_size
    size = clip.config.vision_config.image_size
    self._tokenize = Tokenize(tokenizer, clip.config.text_config.max_position_embeddings)

    def embed_images(params, images):
      images = images.astype(jnp.float32) / 127.5 - 1
      if images.shape[1:3] != (size, size):
        shape = (images.shape[0], size, size, images.shape[-1])
        images = jax.image.resize(images, shape, 'cubic', precision='highest')
      return clip.bind(params).encode_image(images).astype(jnp.float32)

    self._embed_images = jax.jit(embed_images)
    self._embed_texts = jax.jit(
      lambda params, ids: clip.bind(params).encode_text(ids)[1].astype(jnp.float32)
    )

  def _run(self, function, values: np.ndarray) -> np.ndarray:
    batches = in_batches(
      function, self.params, values, mesh=self.mesh, batch_size=self.batch_size
    )
    return np.concatenate(list(batches))

  def images(self, images: np.ndarray) -> np.ndarray:
    """uint8 [n h w 3] -> [n p]; other sizes than the tower's are resized (bicubic, antialiased)."""
    return self._run(self._embed_images, images)

  def texts(self, texts: Sequence[str]) -> np.ndarray:
    """Texts -> [n p]; longer ones than the context are cut."""
    return self._run(self._embed_texts, self._tokenize.batch(texts))
