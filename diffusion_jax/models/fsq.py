"""An autoencoder with finite scalar quantisation (Mentzer et al. 2023, "Finite scalar quantization:
VQ-VAE made simple").

Each of a few channels is bounded and rounded to one of its levels; the codes are the corners of
that grid, so that there is no codebook to learn, or to collapse.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusion_jax.limits import Length, Range
from diffusion_jax.models.autoencoder import AutoencoderConfig
from diffusion_jax.models.quantized import QuantizedAutoencoder
from diffusion_jax.types import Latents

Level = Annotated[int, Range(2, 2**10)]
MOST_CODES = 2**24


@dataclasses.dataclass(frozen=True)
class FSQConfig(AutoencoderConfig):
  """levels: of each channel of a code; their product is the number of codes. The paper's table 1
  recommends (8, 6, 5) for 2^8, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12."""

  levels: Annotated[tuple[Level, ...], Length(1, 16)] = (8, 5, 5, 5)

  def check(self) -> None:
    super().check()
    self.require(
      self.vocabulary <= MOST_CODES, 'levels', f'must have a product up to {MOST_CODES:,}'
    )

  @property
  def vocabulary(self) -> int:
    """Number of codes."""
    return math.prod(self.levels)


def bound(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """z [... d] -> bounded values [... d], which round to L integers: -L/2 to L/2 - 1 of an even L,
  else -(L - 1)/2 to (L - 1)/2.

  Of an even L the bounds are lowered by half a step, and tanh is moved so that 0 stays 0. They are
  a little beyond the outer integers, so that these are reached.
  """
  size = np.asarray(levels, np.float32)
  half = (size - 1) * (1 + 1e-3) / 2
  offset = np.where(size % 2 == 0, np.float32(0.5), np.float32(0))
  return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def quantize(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """z [... d] -> codes [... d], in [-1, 1] of steps of 1/floor(L/2); straight-through gradient."""
  bounded = bound(z, levels)
  rounded = bounded + lax.stop_gradient(jnp.round(bounded) - bounded)
  return rounded / (np.asarray(levels) // 2).astype(np.float32)


def to_indices(codes: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """Codes [... d] of `quantize` -> their number [...] in mixed radix, the first channel fastest."""
  half = np.asarray(levels) // 2
  digits = jnp.round(codes.astype(jnp.float32) * half).astype(jnp.int32) + half
  return (digits * _places(levels)).sum(-1)


def to_codes(indices: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """Inverse of `to_indices`: numbers [...] from 0 to the product of the levels -> codes [... d]."""
  half = np.asarray(levels) // 2
  digits = indices[..., None] // _places(levels) % np.asarray(levels)
  return (digits - half) / half.astype(np.float32)


def _places(levels: tuple[int, ...]) -> np.ndarray:
  """Return the values of a digit of each channel."""
  return np.cumprod([1, *levels[:-1]]).astype(np.int32)


class FSQModel(QuantizedAutoencoder):
  """Images in [-1, 1] <-> codes on the grid of `config.levels`."""

  def __init__(self, config: FSQConfig, **kw):
    super().__init__(config, len(config.levels), len(config.levels), **kw)

  def quantize(self, z: Latents) -> Latents:
    """Latents [b h w d] -> codes [b h w d], computed in float32; straight-through gradient."""
    return quantize(z.astype(jnp.float32), self.config.levels).astype(z.dtype)

  def indices(self, z: Latents) -> jax.Array:
    return to_indices(self.quantize(z), self.config.levels)

  def codes(self, indices: jax.Array) -> Latents:
    return to_codes(indices, self.config.levels)
