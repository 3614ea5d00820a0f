"""No bottleneck but the latents' size: a deterministic autoencoder (Hinton & Salakhutdinov 2006).

It is written as a KL autoencoder whose posterior is a point, which every program reads.
"""

import dataclasses

import jax.numpy as jnp

from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.train.bottlenecks.bottleneck import Bottleneck, Passed
from diffusion_jax.types import Params

POINT = -30.0
"""Log-variance of the posterior: the least that is not clipped."""


@dataclasses.dataclass(frozen=True)
class Plain(Bottleneck):
  """Without settings."""

  title, network = 'Autoencoder', AutoencoderKL

  def config(self, shape):
    return shape

  def initialize(self, params):
    return _to_a_point(params)

  def __call__(self, model, images, carry, key, step):
    mean, _ = model.encode(images)
    output = model.decode(mean).astype(jnp.float32)
    return Passed(output, jnp.zeros(len(images)), {})

  def constrain(self, params, carry):
    return _to_a_point(params)


def _to_a_point(params: Params) -> Params:
  kernel, bias = params['quant_conv.kernel'], params['quant_conv.bias']
  half = len(bias) // 2
  return params | {
    'quant_conv.kernel': kernel.at[..., half:].set(0), 'quant_conv.bias': bias.at[half:].set(POINT)
  }
