"""A Gaussian posterior, kept near N(0, 1) by its KL divergence (Kingma & Welling 2014)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from diffusion_jax.limits import Count, Range
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.train.bottlenecks.bottleneck import Bottleneck, Passed, warmed
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.types import Latents


@dataclasses.dataclass(frozen=True)
class KL(Bottleneck):
  """weight: of the KL, per latent value. initial_logvar: of the latents; below 0 noise does not
  hide weak features, such as colours, at first. warmup_steps: linear growth of the weight from 0,
  to learn features before they cost."""

  weight: Annotated[float, Range(0)] = 1e-3
  warmup_steps: Count = 0
  initial_logvar: float = 0.0
  title, network = 'KL autoencoder', AutoencoderKL

  def config(self, shape):
    return shape

  def initialize(self, params):
    bias = params['quant_conv.bias']
    return params | {'quant_conv.bias': bias.at[len(bias) // 2 :].set(self.initial_logvar)}

  def __call__(self, model, images, carry, key, step):
    mean, logvar = (x.astype(jnp.float32) for x in model.encode(images))
    noise = jax.random.normal(key, mean.shape)
    output = model.decode(mean + jnp.exp(logvar / 2) * noise).astype(jnp.float32)
    kl = kl_divergence(mean, logvar)
    loss = warmed(self.weight, self.warmup_steps, step) * kl
    return Passed(output, loss, {'loss_kl': mean_metric(kl)})


def kl_divergence(mean: Latents, logvar: Latents) -> jax.Array:
  """KL(N(mean, exp(logvar)) || N(0, 1)) per latent value, mean [b] (Kingma & Welling 2014)."""
  kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)
  return kl.mean(axis=(1, 2, 3))
