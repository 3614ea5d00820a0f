"""DALL-E 2's autoregressive prior (Ramesh et al. 2022, section 2.2): embeddings token by token.

It is the model of `image_tokens` with another meaning of tokens: those of `EmbeddingTokens` in
place of an image's. Of several candidates that embedding is kept whose cosine with the caption's is
largest, as the paper does with two of its diffusion prior.
"""

import dataclasses
import functools
from typing import ClassVar

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.pipelines import image_tokens
from diffusion_jax.pipelines.embeddings import NO_PICTURES
from diffusion_jax.pipelines.image_tokens import AUTOENCODER, ImageTokens

KIND = 'TokenPrior'


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPrior(ImageTokens):
  """Captions -> tokens -> embeddings of pictures [b p], which `sample` yields."""

  trained_size: ClassVar = (1, 1)

  @property
  def embedding_dim(self) -> int:
    """Numbers of an embedding."""
    return self.autoencoder.config.embedding_dim

  def encode(self, weights, images) -> jax.Array:
    """Images [b h w 3] in [-1, 1] -> the tokens [b n] of their embeddings."""
    tokens = self.autoencoder.bind(weights[AUTOENCODER])
    return tokens.tokens(self.embed(weights, images))

  def decode(self, weights, tokens) -> jax.Array:
    """Tokens [b n] -> embeddings [b p]."""
    return self.autoencoder.bind(weights[AUTOENCODER]).embeddings(tokens)

  def drawn(self, batch):
    raise UserError(NO_PICTURES)

  def likeness(self, weights, images, text) -> jax.Array:
    """The cosine of embeddings [b p] and those of captions [b l]: [b]."""
    return self.cosine(weights, images, text)


read = functools.partial(image_tokens.read, kind=TokenPrior, codes=('embedding_tokens',))
