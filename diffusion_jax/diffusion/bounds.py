"""Variational bounds on -log p(x_0), in bits per dimension, one value per example.

-log p(x_0) <= prior + diffusion + decoder (Ho et al. 2020, eq. 5; Kingma et al. 2021, eq. 11): the
KL divergence of x_1 from the Gaussian that sampling starts from, those of the steps in between, and
the cost of x_0 given the least noised x. Noise is drawn, so values are unbiased estimates; keys
[b], one per example.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.likelihood import stratified_times, unit_noise
from diffusion_jax.diffusion.losses import total
from diffusion_jax.diffusion.processes import Process
from diffusion_jax.diffusion.variational import (
  bits_per_dim,
  discretized_gaussian,
  gaussian_log_density,
  prior_term,
)
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents, PerExample

Decoder = Callable[[Latents, Latents, Latents, jax.Array, jax.Array], PerExample]
"""(x_0, x, estimate of x_0 from x, alpha [], sigma []) -> -log p(x_0 | x) in nats, [b]."""

VARIANCES = ('fixed_small', 'fixed_large')


class Bound(NamedTuple):
  """Terms of a bound, [b] each, in bits per dimension."""

  prior: PerExample
  diffusion: PerExample
  decoder: PerExample

  @property
  def total(self) -> PerExample:
    return self.prior + self.diffusion + self.decoder


def gaussian_decoder(x0, x, estimate, alpha, sigma) -> PerExample:
  """For continuous data: -log N(x_0; x / alpha, sigma^2 / alpha^2), the density of x_0."""
  del estimate
  return -total(gaussian_log_density(x0, x / alpha, 2 * jnp.log(sigma / alpha)))


def discretized_gaussian_decoder(levels: int = 256) -> Decoder:
  """For images of integers: the mass of N(estimate, sigma^2) in x_0's bin (Ho et al. 2020, eq. 13).

  x_0 in [-1, 1] is 2 k / (levels - 1) - 1; the first and last bins are open.
  """
  def decoder(x0, x, estimate, alpha, sigma):
    del x, alpha
    return -total(discretized_gaussian(x0, estimate, 2 * jnp.log(sigma), levels))

  return decoder


def categorical_decoder(levels: int = 256) -> Decoder:
  """For images of integers: p(x_0 | x) over the levels proportional to q(x | x_0).

  Kingma et al. 2021, section 3.3. Takes memory for `levels` arrays of x_0's size.
  """
  values = 2 * jnp.arange(levels) / (levels - 1) - 1

  def decoder(x0, x, estimate, alpha, sigma):
    del estimate
    logits = -(((x[..., None] - alpha * values.astype(x.dtype)) / sigma) ** 2) / 2
    which = jnp.round((x0 + 1) / 2 * (levels - 1)).astype(int)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), which[..., None], axis=-1)
    return -total(chosen)

  return decoder


def discrete_bound(
  denoise: Denoiser, x0: Latents, alphas: jax.Array, sigmas: jax.Array, keys: jax.Array, *,
  draws: int | None = None, offset: float | jax.Array = 0.5, variance: str = 'fixed_small',
  decoder: Decoder = gaussian_decoder, prior_std: float | None = None,
) -> Bound:
  """The bound of a model of T steps (Ho et al. 2020, eq. 5).

  Each KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) with the posterior's variance ('fixed_small')
  is (SNR(t-1) - SNR(t)) |x_0 - D|^2 / 2 (Kingma et al. 2021, section 4). With r the posterior's
  variance over beta_t, 'fixed_large' makes it r times that, plus (r - 1 - ln r) / 2 per dimension.

  Args:
    x0: [b ...]. alphas, sigmas: [T], from data to noise.
    draws: None evaluates each of the T - 1 steps once. A number draws as many, each with noise of
      its own and evenly spread over the divergences that they would have for unit Gaussian data.
      Each costs one network call.
    offset: where in its stratum each draw lies, in [0, 1); uniformly drawn it makes the estimate
      unbiased, 0.5 makes it repeatable.
    prior_std: of p(x_T); default sqrt(alpha^2 + sigma^2), which is 1 for VP.

  Raises:
    UserError: for an unknown variance.
  """
  if variance not in VARIANCES:
    raise UserError(f'variance {variance!r} is unknown; choose one of {", ".join(VARIANCES)}.')
  alphas, sigmas = jnp.asarray(alphas, x0.dtype), jnp.asarray(sigmas, x0.dtype)
  snr = (alphas / sigmas) ** 2
  gain = snr[:-1] - snr[1:]

  def divergence(index, noise_index):
    alpha, sigma = alphas[index + 1], sigmas[index + 1]
    kl = gain[index] * _error(denoise, x0, alpha, sigma, keys, noise_index) / 2
    if variance == 'fixed_large':
      ratio = (sigmas[index] / sigma) ** 2
      kl = ratio * kl + x0[0].size * (ratio - 1 - jnp.log(ratio)) / 2
    return kl

  if draws is None:
    chosen, weights = jnp.arange(len(gain)), jnp.ones_like(gain)
  else:
    shares = jnp.cumsum(gain / (1 + snr[1:]))
    chosen = jnp.searchsorted(shares, (jnp.arange(draws) + offset) / draws * shares[-1])
    chosen = jnp.minimum(chosen, len(gain) - 1)
    weights = shares[-1] / draws / (gain / (1 + snr[1:]))[chosen]
  items = (chosen, jnp.arange(1, len(chosen) + 1), weights)
  add = lambda nats, item: (nats + item[2] * divergence(*item[:2]), None)
  nats, _ = jax.lax.scan(add, jnp.zeros(len(x0), x0.dtype), items)
  return _bound(
    denoise, x0, nats, (alphas[0], sigmas[0]), (alphas[-1], sigmas[-1]), keys, decoder, prior_std
  )


def continuous_bound(
  denoise: Denoiser, x0: Latents, process: Process, keys: jax.Array, *, draws: int = 128,
  offset: float | jax.Array = 0.5, t_min: float = 1e-5, decoder: Decoder = gaussian_decoder,
  prior_std: float | None = None,
) -> Bound:
  """The bound of a model in continuous time (Kingma et al. 2021, eq. 18).

  The diffusion term, half the integral of |x_0 - D|^2 over the SNR, depends on the process's ends
  only. It is taken over l = log(1 + SNR), which is finite at zero terminal SNR too: the integrand
  |x_0 - D|^2 (1 + SNR) / 2 is constant on average for unit Gaussian data.

  Args:
    x0: [b ...].
    draws: noise levels, one network call each, evenly spread over l.
    offset: as in `discrete_bound`.
    t_min: where data begins; sigma must be above 0 there.
    prior_std: of the Gaussian at t = 1; default sqrt(alpha^2 + sigma^2), which is 1 for VP.
  """
  fractions = (jnp.arange(draws, dtype=x0.dtype) + offset) / draws
  times = stratified_times(process, fractions.astype(x0.dtype), t_min, 1.0)
  ends = process(jnp.asarray(t_min, x0.dtype)), process(jnp.ones((), x0.dtype))
  inverse_noise = lambda alpha, sigma: (alpha**2 + sigma**2) / sigma**2  # 1 + SNR
  length = jnp.log(inverse_noise(*ends[0])) - jnp.log(inverse_noise(*ends[1]))

  def step(nats, item):
    index, t = item
    alpha, sigma = process(t)
    error = _error(denoise, x0, alpha, sigma, keys, index)
    return nats + inverse_noise(alpha, sigma) * error / 2, None

  items = (jnp.arange(1, draws + 1), times)
  nats, _ = jax.lax.scan(step, jnp.zeros(len(x0), x0.dtype), items)
  return _bound(denoise, x0, nats * (length / draws), *ends, keys, decoder, prior_std)


def _error(denoise, x0, alpha, sigma, keys, index) -> PerExample:
  """|x_0 - D(alpha x_0 + sigma eps)|^2 with the index-th noise of each key."""
  x = alpha * x0 + sigma * unit_noise(keys, index, x0)
  return total((x0 - denoise(x, alpha, sigma)) ** 2)


def _bound(denoise, x0, diffusion, first, last, keys, decoder, prior_std) -> Bound:
  """Adds the two end terms, at the least and the most noised (alpha, sigma)."""
  prior_std = jnp.hypot(*last) if prior_std is None else prior_std
  x = first[0] * x0 + first[1] * unit_noise(keys, 0, x0)
  terms = (
    prior_term(x0, *last, prior_std), diffusion, decoder(x0, x, denoise(x, *first), *first)
  )
  return Bound(*(bits_per_dim(term, x0) for term in terms))
