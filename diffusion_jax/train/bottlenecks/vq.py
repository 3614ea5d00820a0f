"""The nearest of a learned set of code vectors (van den Oord et al. 2017).

The set follows the latents by an exponential moving average (appendix A.1; Razavi et al. 2019,
section 3.1) or by gradients (eq. 3). Codes that hardly any latent is nearest to are put in the
place of random latents of the batch (Dhariwal et al. 2020, section 3.1).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax.limits import Fraction, Range
from diffusion_jax.models.config import Width
from diffusion_jax.models.vq import VQConfig, VQModel
from diffusion_jax.train.bottlenecks.bottleneck import Bottleneck, Passed, code_metrics, config_of
from diffusion_jax.train.meter import mean_metric

CODES = 'quantize.embedding.embedding'
LEAST = 1e-6
"""Of a code's average count, below which its place stays."""


@dataclasses.dataclass(frozen=True)
class VQ(Bottleneck):
  """codes: how many; code_channels: of each, None for latent_channels. codebook: learned as an
  average, or by gradients, as the published models. decay: of the average per step. commitment:
  weight of the latents' distance from their codes, beta. dead_below: an average count, as a
  fraction of the mean over codes, below which a code is replaced; 0 for never.
  """

  codes: Width = 512
  code_channels: Width | None = None
  codebook: Literal['average', 'gradient'] = 'average'
  decay: Annotated[float, Range(0, 1, below=True)] = 0.99
  commitment: Annotated[float, Range(0)] = 0.25
  dead_below: Fraction = 0.1
  title, network = 'VQ autoencoder', VQModel

  def config(self, shape):
    return config_of(
      VQConfig, shape, num_vq_embeddings=self.codes, vq_embed_dim=self.code_channels
    )

  def __call__(self, model, images, carry, key, step):
    z = model.encode(images)
    quantized, indices, loss = model.quantize(z, beta=self.commitment, legacy=False)
    metrics = code_metrics(indices, self.codes)
    if carry:
      z, codes = z.astype(jnp.float32), model.codes(indices)
      # The codes' own gradient is left out: they are an average.
      distance = jnp.square(z - lax.stop_gradient(codes.astype(jnp.float32)))
      loss = self.commitment * distance.mean((1, 2, 3))
      metrics = {**metrics, 'codes_revived': mean_metric(carry['revived'])}
    output = model.decode(quantized, quantized=True).astype(jnp.float32)
    observed = (lax.stop_gradient(z), indices, jax.random.uniform(key, indices.shape))
    return Passed(
      output, loss, {**metrics, 'loss_commitment': mean_metric(loss)}, observed if carry else ()
    )

  def carry(self, config):
    """'counts' [n] and 'sums' [n e] of the latents of each code, 'revived': how many so far."""
    if self.codebook == 'gradient':
      return {}
    return {
      'counts': jnp.zeros(self.codes), 'sums': jnp.zeros((self.codes, config.code_channels)),
      'revived': jnp.zeros(()),
    }

  def next_carry(self, carry, observed):
    if not carry:
      return carry
    z, indices, random = observed
    z, indices = z.reshape(-1, z.shape[-1]), indices.reshape(-1)
    counts, sums = averages(carry['counts'], carry['sums'], z, indices, self.decay)
    dead = counts < self.dead_below * len(z) / self.codes
    # A dead code gets a latent of its own as long as there are enough: the first ones in random
    # order, and the count of a code of average use, so that it has time to find its place.
    order = jnp.argsort(random.reshape(-1))
    own = z[order[(jnp.cumsum(dead) - 1) % len(z)]]
    count = jnp.float32(len(z) / self.codes)
    first = carry['counts'].sum() == 0  # When all begin at latents, none is revived.
    return {
      'counts': jnp.where(dead, count, counts),
      'sums': jnp.where(dead[:, None], count * own, sums),
      'revived': carry['revived'] + jnp.where(first, 0, dead.sum()),
    }

  def constrain(self, params, carry):
    if not carry:
      return params
    counts = carry['counts'][:, None]
    codes = jnp.where(counts > LEAST, carry['sums'] / jnp.maximum(counts, LEAST), params[CODES])
    return params | {CODES: codes.astype(params[CODES].dtype)}


def averages(
  counts: jax.Array, sums: jax.Array, z: jax.Array, indices: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
  """Return the averages (N [n], m [n e]) after a batch of latents z [k e] of the codes [k].

  N_i <- decay N_i + (1 - decay) n_i; m_i <- decay m_i + (1 - decay) sum of the z of code i (van den
  Oord et al. 2017, eq. 6-8); the code is m_i / N_i.
  """
  new = lambda before, values: decay * before + (1 - decay) * jnp.zeros_like(before).at[
    indices
  ].add(values)
  return new(counts, 1.0), new(sums, z)
