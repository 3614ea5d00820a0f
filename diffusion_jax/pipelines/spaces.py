"""What a generative model is of: pixels, latents of an autoencoder, or plain vectors.

A space knows how examples become the z that is noised and denoised, at about unit variance, how z
becomes an example again, and the shape of z for an image of any size. It holds networks, but no
weights and no size.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion_jax.backend.xla import jit
from diffusion_jax.errors import UserError
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import Part, read_network, read_part, resolve
from diffusion_jax.limits import Range
from diffusion_jax.models.autoencoder import decode_sliced, decode_tiled
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Images, Latents, Params, Weights

AUTOENCODER = 'autoencoder'
"""The role of its weights."""

DECODERS = {
  'whole': lambda autoencoder, z: autoencoder.decode(z), 'sliced': decode_sliced,
  'tiled': decode_tiled,
}

Moments = dict[str, jax.Array]
"""What is known of the z [b ...] of examples before it is sampled, and what a cache keeps."""


class Space(Protocol):
  """Where examples are noised. A row of `registry.SPACES` has a dataclass `Config`, whose
  `build(dtype)` gives a space and where the weights of its networks lie, by role."""

  name: str
  """Of its row."""
  paths: tuple[str, ...]
  """Those fields of its config that are directories, or 'asset:NAME'."""

  channels: int
  """Of z, its last dimension."""
  factor: int
  """Pixels of an edge of the image to one place of z."""
  networks: Mapping[str, Network]
  """By the role of their weights."""
  field: str
  """Of a batch, where its examples are."""
  kept: tuple[str, ...]
  """Names of the moments."""
  random: bool
  """Whether `sample` needs its key."""

  def shape(self, height: int, width: int) -> tuple[int, ...]:
    """Shape of one z for an image of height x width pixels. UserError where there is none."""

  def moments(self, weights: Weights, examples: jax.Array) -> Moments:
    """Examples [b ...], images in [-1, 1] -> all that `sample` needs."""

  def sample(self, moments: Moments, key: jax.Array) -> jax.Array:
    """z [b ...] of these moments, float32."""

  def encode(self, weights: Weights, examples: jax.Array) -> jax.Array:
    """The mean of z [b ...], float32."""

  def decode(self, weights: Weights, z: jax.Array, how: str = 'whole') -> jax.Array:
    """z [b ...] -> examples, images in [-1, 1]; `how` is one of `sampling.DECODINGS`."""


def fold(x: Latents, patch: int) -> Latents:
  """Squares of positions become channels: [b h w c] -> [b h/patch w/patch patch*patch*c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
  return x.reshape(b, h // patch, w // patch, patch * patch * c)


def unfold(x: Latents, patch: int) -> Latents:
  """Inverse of `fold`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, patch, patch, c // patch**2).swapaxes(2, 3)
  return x.reshape(b, h * patch, w * patch, c // patch**2)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """autoencoder: a directory, or 'asset:NAME'. patch: p folds p x p places of the latents into
  channels, so that the denoiser sees fewer."""

  autoencoder: str
  patch: Annotated[int, Range(1, 64)] = 1

  @property
  def factor(self) -> int:
    """Pixels of an edge of the image to one place of z."""
    return read_network('autoencoder', self.autoencoder).config.factor * self.patch

  def build(self, dtype=jnp.float32) -> tuple['LatentSpace', dict[str, Part]]:
    """UserError where there is no autoencoder."""
    check_folder(resolve(self.autoencoder))  # It is copied beside what is trained, at the end.
    part = read_part(self.autoencoder).expect(('autoencoder',))
    return LatentSpace(part.network(dtype=dtype), self.patch), {AUTOENCODER: part}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace:
  """Latents of an autoencoder, scaled to unit variance; `patch` folds squares into channels."""

  Config: ClassVar[type] = LatentConfig
  name: ClassVar[str] = 'latents'
  paths: ClassVar[tuple[str, ...]] = ('autoencoder',)
  autoencoder: Network
  patch: int = 1
  field: ClassVar[str] = 'image'
  kept: ClassVar[tuple[str, ...]] = ('mean', 'std')
  random: ClassVar[bool] = True

  @property
  def networks(self) -> dict[str, Network]:
    return {AUTOENCODER: self.autoencoder}

  @property
  def channels(self) -> int:
    return self.autoencoder.config.latent_channels * self.patch**2

  @property
  def factor(self) -> int:
    return self.autoencoder.config.factor * self.patch

  def shape(self, height: int, width: int) -> tuple[int, int, int]:
    _check_divides(height, width, self.factor)
    return height // self.factor, width // self.factor, self.channels

  def scaled(self, z: Latents) -> Latents:
    """The autoencoder's own latents -> z: unit variance, folded."""
    config = self.autoencoder.config
    return fold((z - config.shift_factor) * config.scaling_factor, self.patch)

  def moments(self, weights: Weights, examples: Images) -> Moments:
    """Of the autoencoder's own latents: 'mean' and 'std' [b h w c], float32."""
    mean, logvar = self.autoencoder.bind(weights[AUTOENCODER]).encode(examples)
    return {
      'mean': mean.astype(jnp.float32), 'std': jnp.exp(logvar.astype(jnp.float32) / 2)
    }

  def sample(self, moments: Moments, key: jax.Array) -> Latents:
    mean, std = moments['mean'], moments['std']
    return self.scaled(mean + std * jax.random.normal(key, mean.shape))

  def encode(self, weights: Weights, examples: Images) -> Latents:
    return self.scaled(self.raw(weights, examples))

  def raw(self, weights: Weights, examples: Images) -> Latents:
    """Mean of the autoencoder's own latents, neither scaled nor folded."""
    mean, _ = self.autoencoder.bind(weights[AUTOENCODER]).encode(examples)
    return mean.astype(jnp.float32)

  def decode(self, weights: Weights, z: Latents, how: str = 'whole') -> Images:
    config = self.autoencoder.config
    z = unfold(z, self.patch) / config.scaling_factor + config.shift_factor
    images = DECODERS[how](self.autoencoder.bind(weights[AUTOENCODER]), z)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class PixelConfig:
  """patch: p folds p x p pixels into channels."""

  patch: Annotated[int, Range(1, 64)] = 1

  @property
  def factor(self) -> int:
    """Pixels of an edge of the image to one place of z."""
    return self.patch

  def build(self, dtype=jnp.float32) -> tuple['PixelSpace', dict[str, Part]]:
    """There is nothing to load."""
    del dtype
    return PixelSpace(self.patch), {}


@dataclasses.dataclass(frozen=True, eq=False)
class PixelSpace:
  """Images themselves; `patch` folds squares of pixels into channels."""

  Config: ClassVar[type] = PixelConfig
  name: ClassVar[str] = 'pixels'
  paths: ClassVar[tuple[str, ...]] = ()
  patch: int = 1
  field: ClassVar[str] = 'image'
  kept: ClassVar[tuple[str, ...]] = ('pixels',)
  random: ClassVar[bool] = False
  networks: ClassVar[Mapping[str, Network]] = MappingProxyType({})

  @property
  def channels(self) -> int:
    return 3 * self.patch**2

  @property
  def factor(self) -> int:
    return self.patch

  def shape(self, height: int, width: int) -> tuple[int, int, int]:
    _check_divides(height, width, self.patch)
    return height // self.patch, width // self.patch, self.channels

  def moments(self, weights: Weights, examples: Images) -> Moments:
    del weights
    return {'pixels': examples}

  def sample(self, moments: Moments, key: jax.Array) -> Images:
    del key
    return fold(moments['pixels'].astype(jnp.float32), self.patch)

  def encode(self, weights: Weights, examples: Images) -> Images:
    del weights
    return fold(examples.astype(jnp.float32), self.patch)

  raw = encode

  def decode(self, weights: Weights, z: Images, how: str = 'whole') -> Images:
    del weights, how
    return jnp.clip(unfold(z, self.patch).astype(jnp.float32), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class VectorConfig:
  """channels: numbers in a vector."""

  channels: Annotated[int, Range(1)] = 2
  factor: ClassVar[int] = 1

  def build(self, dtype=jnp.float32) -> tuple['VectorSpace', dict[str, Part]]:
    """There is nothing to load."""
    del dtype
    return VectorSpace(self.channels), {}


@dataclasses.dataclass(frozen=True, eq=False)
class VectorSpace:
  """Vectors [channels], such as points in the plane; they have no height and no width."""

  Config: ClassVar[type] = VectorConfig
  name: ClassVar[str] = 'vectors'
  paths: ClassVar[tuple[str, ...]] = ()
  channels: int = 2
  factor: ClassVar[int] = 1
  field: ClassVar[str] = 'points'
  kept: ClassVar[tuple[str, ...]] = ('vectors',)
  random: ClassVar[bool] = False
  networks: ClassVar[Mapping[str, Network]] = MappingProxyType({})

  def shape(self, height: int = 1, width: int = 1) -> tuple[int]:
    del height, width
    return (self.channels,)

  def moments(self, weights: Weights, examples: jax.Array) -> Moments:
    """Of examples [b ... c], whose leading dimensions all count examples."""
    del weights
    return {'vectors': examples.reshape(-1, self.channels)}

  def sample(self, moments: Moments, key: jax.Array) -> jax.Array:
    del key
    return moments['vectors']

  def encode(self, weights: Weights, examples: jax.Array) -> jax.Array:
    return self.moments(weights, examples)['vectors']

  def decode(self, weights: Weights, z: jax.Array, how: str = 'whole') -> jax.Array:
    del weights, how
    return z


def _check_divides(height: int, width: int, factor: int) -> None:
  for name, value in (('height', height), ('width', width)):
    if value < 1 or value % factor:
      near = max(factor, factor * round(value / factor))
      raise UserError(
        f'{name} is {value}, but the model draws multiples of {factor}; choose {near}.'
      )


def latent_moments(
  network: Network, params: Params, images: UInt8[np.ndarray, 'n h w 3'], mesh: Mesh
) -> tuple[float, float]:
  """Return the mean and standard deviation over all sampled latent values of the images."""

  def run(params, images):
    mean, logvar = network.bind(params).encode(to_float(images))
    return jnp.stack([mean, jnp.exp(logvar)], axis=-1).astype(jnp.float32)

  both = np.concatenate(list(in_batches(jit(run), params, images, mesh=mesh)))
  variance = both[..., 0].var() + both[..., 1].mean()
  return float(both[..., 0].mean()), float(variance**0.5)
