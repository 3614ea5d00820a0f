"""The space of CLIP's embeddings of pictures, in which DALL-E 2's prior works (Ramesh et al. 2022).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import resolve
from diffusion_jax.models.config import Factor
from diffusion_jax.pipelines.conditioners import Context
from diffusion_jax.pipelines.image_conditioners import ImageEncoder
from diffusion_jax.pipelines.spaces import Space

NO_PICTURES = (
  'a prior alone draws embeddings and no pictures; give the directory of it and its decoder.'
)


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """clip: a directory with CLIP, or its vision tower, or 'asset:NAME'. scale: what embeddings are
  multiplied by, so that their numbers are of about unit variance."""

  clip: str
  scale: Factor = 1.0
  factor: ClassVar = 1

  def build(self, dtype=jnp.float32):
    """UserError where there is no CLIP."""
    check_folder(resolve(self.clip))
    context = Context(None, None, dtype)
    encoder, parts = ImageEncoder.build({'path': self.clip}, context)
    return EmbeddingSpace(encoder, self.scale), parts


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingSpace(Space):
  """Pictures -> their embeddings [b p], scaled; 'decoded' they are the embeddings themselves."""

  Config: ClassVar = EmbeddingConfig
  name: ClassVar = 'embeddings'
  paths: ClassVar = ('clip',)
  factor: ClassVar = 1
  encoder: ImageEncoder
  scale: float = 1.0

  @property
  def networks(self):
    return self.encoder.networks

  @property
  def channels(self) -> int:
    return self.encoder.width

  @property
  def embedding_dim(self) -> int:
    """Numbers of an embedding."""
    return self.encoder.width

  def shape(self, height=1, width=1):
    return (self.channels,)

  def encode(self, weights, examples):
    return self.scale * self.raw(weights, examples)

  def raw(self, weights, examples):
    return self.encoder.of_batch(weights, {'image': examples})['text'][:, 0]

  def decode(self, weights, z, how='whole'):
    return z / self.scale

  def drawn(self, examples):
    raise UserError(NO_PICTURES)
