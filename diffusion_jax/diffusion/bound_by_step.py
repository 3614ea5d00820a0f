"""The bound of a model of T steps by its three terms, step by step, for pixels of 8 bits.

-log p(x_0) <= L_T + sum of L_{t-1} for t = 2 .. T, and L_0 (Ho, Jain & Abbeel 2020, eq. 5): the
divergence of x_T from what sampling starts from, those of the steps, and the cost of the pixels'
levels given x_1, by a Gaussian's mass in the bin of each (eq. 13).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.bounds import (
  Decoder,
  bits_per_dim,
  bound_term,
  discretized_gaussian,
  log_variances,
  prior_term,
  spread_steps,
)
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import unit_noise
from diffusion_jax.types import Latents, PerExample

VARIANCES = ('fixed_small', 'fixed_large', 'learned')
"""Of each p(x_{t-1} | x_t), as for the sampler `ddpm`."""


class StepTerms(NamedTuple):
  """Terms in bits per dimension; of steps 1 to T - 1 a number stands for all, with weights [n].

  prior [b]: L_T. decoder [b]: L_0. steps [n b]: L of the steps from timesteps [n].
  """

  prior: PerExample
  decoder: PerExample
  steps: jax.Array
  timesteps: jax.Array
  weights: jax.Array

  @property
  def diffusion(self) -> PerExample:
    """The sum over all steps [b]."""
    return (self.weights[:, None] * self.steps).sum(axis=0)

  @property
  def total(self) -> PerExample:
    return self.prior + self.diffusion + self.decoder


def bound_by_step(
  denoise: Denoiser, x0: Latents, alphas: np.ndarray, sigmas: np.ndarray, keys: jax.Array, *,
  draws: int | None = None, offset: float | jax.Array = 0.5, variance: str = 'fixed_small',
  decoder: Decoder = discretized_gaussian,
) -> StepTerms:
  """Return the terms for x0 [b ...] in [-1, 1], with noise of keys [b].

  Args:
    denoise: D(x, alpha, sigma) -> x_0, or for a learned variance (x_0, f) as for `ddpm`.
    alphas, sigmas: [T], from data to noise.
    draws: so many of the T - 1 steps, see `bounds.spread_steps`; None for all. Each of them, and
      the decoder, costs one network call.
    variance: one of VARIANCES.
  """
  grid = np.append(alphas[::-1], 1.0), np.append(sigmas[::-1], 0.0)
  small, large = (bound[::-1].astype(x0.dtype) for bound in log_variances(grid))
  alphas, sigmas = jnp.asarray(alphas, x0.dtype), jnp.asarray(sigmas, x0.dtype)
  before = tuple(jnp.append(jnp.asarray(first, x0.dtype), part[:-1])
                 for first, part in ((1.0, alphas), (0.0, sigmas)))

  def term(t, number):
    here, there = (alphas[t], sigmas[t]), (before[0][t], before[1][t])
    x = here[0] * x0 + here[1] * unit_noise(keys, number, x0)
    estimate = denoise(x, *here)
    estimate, fraction = estimate if variance == 'learned' else (
      estimate, float(variance == 'fixed_large')
    )
    log_variance = fraction * large[t] + (1 - fraction) * small[t]
    found = bound_term(x0, x, estimate, here, there, jnp.asarray(log_variance), decoder)
    return bits_per_dim(found, x0)

  chosen, weights = spread_steps(alphas, sigmas, draws, offset)
  timesteps = chosen + 1
  numbers = jnp.arange(1, len(timesteps) + 1)
  steps = jax.lax.map(lambda item: term(*item), (timesteps, numbers))
  prior = prior_term(x0, alphas[-1], sigmas[-1], jnp.hypot(alphas[-1], sigmas[-1]))
  return StepTerms(bits_per_dim(prior, x0), term(jnp.array(0), 0), steps, timesteps, weights)
