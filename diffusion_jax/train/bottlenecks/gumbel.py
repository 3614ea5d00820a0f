"""A categorical posterior, relaxed by Gumbel noise (Ramesh et al. 2021, section 2.1, appendix A.2).
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from diffusion_jax.limits import Count, Range
from diffusion_jax.models.config import Width
from diffusion_jax.models.dvae import DiscreteVAE, DVAEConfig
from diffusion_jax.train.bottlenecks.bottleneck import (
  Bottleneck,
  Passed,
  annealed,
  code_metrics,
  config_of,
  warmed,
)
from diffusion_jax.train.meter import mean_metric

Temperature = Annotated[float, Range(0, above=True)]


@dataclasses.dataclass(frozen=True)
class Gumbel(Bottleneck):
  """temperature: of the relaxation, annealed by half a cosine to final_temperature within
  temperature_steps. weight: of the KL from the uniform distribution, per place and in nats, which
  grows linearly within warmup_steps. The paper: 1 to 1/16 within 150,000 steps, and a weight that
  favours use of all codes (6.6 where the reconstruction's log-likelihood is summed over the image).
  """

  codes: Width = 512
  code_channels: Width = 64
  temperature: Temperature = 1.0
  final_temperature: Temperature = 0.0625
  temperature_steps: Count = 150_000
  weight: Annotated[float, Range(0)] = 1e-3
  warmup_steps: Count = 5000
  title, network = 'Discrete VAE', DiscreteVAE

  def config(self, shape):
    return config_of(
      DVAEConfig, shape, num_vq_embeddings=self.codes, vq_embed_dim=self.code_channels
    )

  def __call__(self, model, images, carry, key, step):
    logits = model.encode(images).astype(jnp.float32)
    temperature = annealed(
      self.temperature, self.final_temperature, self.temperature_steps, step
    )
    output = model.decode_codes(model.relaxed(logits, key, temperature)).astype(jnp.float32)
    kl = kl_from_uniform(logits)
    loss = warmed(self.weight, self.warmup_steps, step) * kl
    return Passed(output, loss, {
      'loss_kl': mean_metric(kl), 'temperature': mean_metric(temperature),
      **code_metrics(model.indices(logits), self.codes),
    })


def kl_from_uniform(logits: jax.Array) -> jax.Array:
  """KL(softmax(logits) || uniform) in nats, [b h w n] -> mean over places [b]."""
  log_q = jax.nn.log_softmax(logits)
  return ((jnp.exp(log_q) * log_q).sum(-1) + math.log(logits.shape[-1])).mean((1, 2))
