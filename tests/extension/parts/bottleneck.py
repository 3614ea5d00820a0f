"""A bottleneck: latents with noise of a fixed deviation, which limits what they can say."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.registry import BOTTLENECKS, register
from diffusion_jax.train.bottlenecks.bottleneck import Bottleneck, Passed
from diffusion_jax.train.meter import mean_metric


@dataclasses.dataclass(frozen=True)
class Noisy(Bottleneck):
  """deviation: of the noise. weight: of the squared latents, or they would grow to drown it."""

  deviation: float = 0.1
  weight: float = 1e-3
  title, network = 'Noisy autoencoder', AutoencoderKL

  def config(self, shape):
    return shape

  def __call__(self, model, images, carry, key, step):
    z = model.encode(images)[0].astype(jnp.float32)
    output = model.decode(z + self.deviation * jax.random.normal(key, z.shape))
    power = jnp.square(z).mean((1, 2, 3))
    return Passed(
      output.astype(jnp.float32), self.weight * power, {'latent_power': mean_metric(power)}
    )


register(BOTTLENECKS, 'noisy', f'{__name__}:Noisy')
