"""A variational autoencoder as a generative model (Kingma & Welling 2014): z of the prior, decoded.

Any KL autoencoder in a directory is one; how well it draws depends on how near the KL divergence
has brought its latents to the prior.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.backend import xla
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import CONFIG, Part, read_part, resolve
from diffusion_jax.limits import Range
from diffusion_jax.models.network import Network
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.generator import NumbersOnly, OfOneSize
from diffusion_jax.pipelines.spaces import AUTOENCODER
from diffusion_jax.types import Images, Weights


@dataclasses.dataclass(frozen=True)
class VAESampleConfig(NumbersOnly):
  """temperature: standard deviation of z; 1 is the prior, less draws what is more usual."""

  temperature: Annotated[float, Range(0, 1e3)] = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class VAE(OfOneSize):
  """z ~ N(0, I) -> images of that (height, width) in pixels; prompts only name the files."""

  autoencoder: Network
  size: tuple[int, int]
  Sample: ClassVar = VAESampleConfig
  drawn_by: ClassVar = (AUTOENCODER,)
  likelihood: ClassVar = 'elbo'

  @property
  def networks(self) -> Mapping[str, Network]:
    return {AUTOENCODER: self.autoencoder}

  @property
  def trained_size(self) -> tuple[int, int]:
    return self.size

  @property
  def shape(self) -> tuple[int, int, int]:
    """The shape of one z."""
    config = self.autoencoder.config
    return *(edge // config.factor for edge in self.size), config.latent_channels

  def prompt(self, record):
    return ''

  def rows(self, prompts, *_, **__):
    """Nothing: prompts say nothing."""
    return {}

  @functools.partial(xla.jit, static_argnums=0)
  def _sample(self, weights: Weights, keys: jax.Array, temperature: jax.Array) -> Images:
    keys = jax.random.wrap_key_data(keys)
    z = jax.vmap(lambda key: jax.random.normal(key, self.shape))(keys)
    images = self.autoencoder.bind(weights[AUTOENCODER]).decode(temperature * z)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)

  def sample(
    self, weights, prompts, config: VAESampleConfig, *, seed, mesh, negative='', batch_size=16,
    first=0, inputs=None, height=None, width=None,
  ) -> Iterator[np.ndarray]:
    """Yield images, float32 [b h w 3] in [-1, 1], one for each prompt, means of the decoder.

    Image i depends on the seed and its number first + i alone.
    """
    keys = self.keys(
      config, len(prompts), seed=seed, first=first, negative=negative, height=height, width=width
    )
    draw = lambda weights, keys: self._sample(weights, keys, np.float32(config.temperature))
    yield from in_batches(draw, weights, keys, mesh=mesh, batch_size=batch_size)


def read(path: str, dtype=jnp.float32) -> tuple[VAE, dict[str, Part], VAESampleConfig]:
  """As `pipelines.generator.read_generator`, of the directory of a KL autoencoder."""
  part = read_part(path).expect(('autoencoder',))
  size = part.config.sample_size
  if size is None:
    raise UserError(
      f'{resolve(path) / CONFIG} does not say what size of pictures the autoencoder draws; add '
      'sample_size, in pixels.'
    )
  size = (size, size) if isinstance(size, int) else tuple(size)
  return VAE(part.network(dtype=dtype), size), {AUTOENCODER: part}, VAESampleConfig()
