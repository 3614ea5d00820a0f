"""Spaces of generative models: pixels, latents of an autoencoder, or plain vectors.

A space maps examples to the z that is noised and denoised, at about unit variance, and back, and
gives z's shape for any image size. It holds networks without weights.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar

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
from diffusion_jax.models.autoencoder import decode_sliced, decode_tiled, encode_tiled
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.bins import cut_out
from diffusion_jax.pixels import to_float, to_uint8
from diffusion_jax.types import Latents, Params, Weights

AUTOENCODER = 'autoencoder'
"""The role of its weights."""

MOST_WHOLE = 160 * 160
"""Places of latents above which an image is encoded and decoded in tiles: 1280 x 1280 pixels of a
factor of 8. Attention over all places takes memory with their square."""


def _up_to_a_size(decode: Callable) -> Callable:
  return lambda autoencoder, z: (
    decode if z.shape[1] * z.shape[2] <= MOST_WHOLE else decode_tiled
  )(autoencoder, z)


DECODERS = {
  'whole': _up_to_a_size(lambda autoencoder, z: autoencoder.decode(z)),
  'sliced': _up_to_a_size(decode_sliced), 'tiled': decode_tiled,
  'undivided': lambda autoencoder, z: autoencoder.decode(z),
}

Moments = dict[str, jax.Array]
"""Moments of z [b ...], from which it is sampled, and which a cache keeps."""

Patch = Annotated[int, Range(1, 64)]


class Space(abc.ABC):
  """The space of noised examples. A row of `registry.SPACES` is one that is its own config, or has
  one as `Config`, whose `build(dtype)` gives it and where the weights of its networks lie, by role.
  """

  name: ClassVar[str]
  """Name of its row."""
  paths: ClassVar[tuple[str, ...]] = ()
  """Config fields that are directories, or 'asset:NAME'."""
  channels: int
  """Last dimension of z."""
  factor: int
  """Pixels of an edge of the image to one place of z."""
  networks: Mapping[str, Network] = MappingProxyType({})
  """By the role of their weights."""
  field: ClassVar[str] = 'image'
  """Field of a batch with its examples."""
  kept: ClassVar[tuple[str, ...]] = ('z',)
  """Names of the moments."""
  random: ClassVar[bool] = False
  """True if `sample` needs its key."""
  embedding_dim: int | None = None
  """Numbers of an embedding, of a space of such."""
  numbers: ClassVar[bool] = False
  """True if examples are more than pictures of them: files of them hold their numbers, too."""

  def build(self, dtype=jnp.float32) -> tuple['Space', dict[str, Part]]:
    """Return the space of this config; there is nothing to load."""
    del dtype
    return self, {}

  def shape(self, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of one z for an image of height x width pixels. UserError where none is."""
    for name, value in (('height', height), ('width', width)):
      if value < 1 or value % self.factor:
        near = max(self.factor, self.factor * round(value / self.factor))
        raise UserError(
          f'{name} is {value}, but the model draws multiples of {self.factor}; choose {near}.'
        )
    return height // self.factor, width // self.factor, self.channels

  def moments(self, weights: Weights, examples: jax.Array) -> Moments:
    """Examples [b ...], images in [-1, 1] -> all that `sample` needs."""
    return {'z': self.encode(weights, examples)}

  def sample(self, moments: Moments, key: jax.Array) -> jax.Array:
    """Moments -> z [b ...], float32."""
    del key
    return moments['z']

  @abc.abstractmethod
  def encode(self, weights: Weights, examples: jax.Array) -> jax.Array:
    """Examples [b ...] -> the mean of z [b ...], float32."""

  def raw(self, weights: Weights, examples: jax.Array) -> jax.Array:
    """Examples [b ...] -> z [b ...] before it is scaled."""
    return self.encode(weights, examples)

  @abc.abstractmethod
  def decode(self, weights: Weights, z: jax.Array, how: str = 'whole') -> jax.Array:
    """z [b ...] -> examples, images in [-1, 1]; `how` is one of `sampling.DECODINGS`."""

  def drawn(self, examples: np.ndarray) -> UInt8[np.ndarray, 'b h w 3']:
    """Return pictures of examples."""
    return to_uint8(examples)


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
  patch: Patch = 1

  @property
  def factor(self) -> int:
    """Pixels of an edge of the image to one place of z."""
    return read_network('autoencoder', self.autoencoder).config.factor * self.patch

  def build(self, dtype=jnp.float32) -> tuple['LatentSpace', dict[str, Part]]:
    """UserError where there is no autoencoder."""
    check_folder(resolve(self.autoencoder))  # It is copied with what is trained, at the end.
    part = read_part(self.autoencoder).expect(('autoencoder',))
    return LatentSpace(part.network(dtype=dtype), self.patch), {AUTOENCODER: part}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace(Space):
  """Latents of an autoencoder, scaled to unit variance; `patch` folds squares into channels."""

  Config: ClassVar = LatentConfig
  name: ClassVar = 'latents'
  paths: ClassVar = ('autoencoder',)
  kept: ClassVar = ('mean', 'logvar')
  random: ClassVar = True
  autoencoder: Network
  patch: int = 1

  @property
  def networks(self) -> dict[str, Network]:
    return {AUTOENCODER: self.autoencoder}

  @property
  def channels(self) -> int:
    return self.autoencoder.config.latent_channels * self.patch**2

  @property
  def factor(self) -> int:
    return self.autoencoder.config.factor * self.patch

  @property
  def wraps(self) -> bool:
    """True where images continue beyond their edges, so that tiles would not do."""
    return self.autoencoder.compute.tiling != 'none'

  def scaled(self, z: Latents) -> Latents:
    """The autoencoder's own latents -> z: unit variance, folded."""
    config = self.autoencoder.config
    return fold((z - config.shift_factor) * config.scaling_factor, self.patch)

  def moments(self, weights, examples):
    """'mean' and 'logvar' [b h w c], float32, of the autoencoder's own latents."""
    mean, logvar = self._encoded(weights, examples)
    return {'mean': mean.astype(jnp.float32), 'logvar': logvar.astype(jnp.float32)}

  def sample(self, moments, key):
    mean, std = moments['mean'], jnp.exp(moments['logvar'] / 2)
    return self.scaled(mean + std * jax.random.normal(key, mean.shape))

  def encode(self, weights, examples):
    return self.scaled(self.raw(weights, examples))

  def raw(self, weights, examples):
    """Mean of the autoencoder's own latents, neither scaled nor folded."""
    mean, _ = self._encoded(weights, examples)
    return mean.astype(jnp.float32)

  def _encoded(self, weights: Weights, examples: jax.Array) -> tuple[Latents, Latents]:
    """Return the autoencoder's mean and log-variance, of large images in tiles."""
    autoencoder = self.autoencoder.bind(weights[AUTOENCODER])
    height, width = examples.shape[1:3]
    if self.wraps or height * width <= MOST_WHOLE * autoencoder.config.factor**2:
      return autoencoder.encode(examples)
    return encode_tiled(autoencoder, examples)

  def decode(self, weights, z, how='whole', size=None):
    """`size`: (height, width) that is cut out of the images, before they are brought into bounds.
    """
    config = self.autoencoder.config
    z = unfold(z, self.patch) / config.scaling_factor + config.shift_factor
    how = 'undivided' if self.wraps else how
    images = DECODERS[how](self.autoencoder.bind(weights[AUTOENCODER]), z)
    images = images if size is None else cut_out(images, *size)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class PixelSpace(Space):
  """Images themselves; patch: p folds p x p pixels into channels."""

  name: ClassVar = 'pixels'
  patch: Patch = 1

  @property
  def channels(self) -> int:
    return 3 * self.patch**2

  @property
  def factor(self) -> int:
    return self.patch

  def encode(self, weights, examples):
    return fold(examples.astype(jnp.float32), self.patch)

  def decode(self, weights, z, how='whole'):
    return jnp.clip(unfold(z, self.patch).astype(jnp.float32), -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class VectorSpace(Space):
  """Vectors [channels], such as points in the plane; they have no height and no width."""

  name: ClassVar = 'vectors'
  field: ClassVar = 'points'
  factor: ClassVar = 1
  channels: Annotated[int, Range(1)] = 2

  def shape(self, height=1, width=1):
    return (self.channels,)

  def encode(self, weights, examples):
    """Examples [b ... c], whose leading dimensions all count examples -> [n c]."""
    return examples.reshape(-1, self.channels)

  def decode(self, weights, z, how='whole'):
    return z


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
