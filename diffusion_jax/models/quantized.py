"""Autoencoders whose latents are codes: one of a fixed number at each place.

What they share: encoder, decoder, and the ways between images, latents and indices of codes. How a
latent becomes a code is what differs: the nearest of a learned set (`vq`), rounding (`fsq`), the
likeliest of a categorical distribution (`dvae`).
"""

import abc
from typing import Any

import jax
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.models.autoencoder import Decoder, Encoder
from diffusion_jax.models.config import check_size
from diffusion_jax.models.layers import pointwise
from diffusion_jax.types import Images, Latents


class QuantizedAutoencoder(nnx.Module):
  """Images in [-1, 1] <-> latents <-> indices of codes, images and latents NHWC.

  `config.vocabulary` is the number of codes. features: channels of the latents before they are
  quantised; code_channels: of a code.
  """

  def __init__(self, config: Any, features: int, code_channels: int, **kw):
    c = config.latent_channels
    self.config, self.features, self.code_channels = config, features, code_channels
    self.encoder = Encoder(config, c, **kw)
    self.decoder = Decoder(config, **kw)
    self.quant_conv = pointwise(c, features, **kw)
    self.post_quant_conv = pointwise(code_channels, c, **kw)

  def encode(self, images: Images) -> Latents:
    """Images [b h w 3] in [-1, 1] -> latents [b h/f w/f features] before quantisation, unscaled.

    UserError where h or w is no multiple of f.
    """
    check_size(images.shape, self.config.in_channels, self.config.factor, 'The images to encode')
    return self.quant_conv(self.encoder(images))

  @abc.abstractmethod
  def indices(self, z: Latents) -> jax.Array:
    """Latents [b h w features] -> indices [b h w] of their codes."""

  @abc.abstractmethod
  def codes(self, indices: jax.Array) -> Latents:
    """Indices [b h w] -> codes [b h w code_channels]."""

  def decode_codes(self, codes: Latents) -> Images:
    """Codes, or mixtures of them, [b h/f w/f code_channels] -> images [b h w 3], not clipped."""
    check_size(codes.shape, self.code_channels, 1, 'The codes to decode')
    return self.decoder(self.post_quant_conv(codes))

  def encode_indices(self, images: Images) -> jax.Array:
    """Images [b h w 3] in [-1, 1] -> indices of codes [b h/f w/f]."""
    return self.indices(self.encode(images))

  def decode_indices(self, indices: jax.Array) -> Images:
    """Indices of codes [b h/f w/f] -> images [b h w 3], not clipped."""
    require(indices.ndim == 3, f'Code indices must have shape [b h w], not {list(indices.shape)}.')
    return self.decode_codes(self.codes(indices))

  def reconstruct(self, images: Images) -> Images:
    """Images [b h w 3] in [-1, 1] -> what is left of them, [b h w 3], not clipped."""
    return self.decode_indices(self.encode_indices(images))
