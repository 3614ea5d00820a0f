"""The variational bound on -log p(x_0): its terms in training, in evaluation, in closed form.

-log p(x_0) <= prior + diffusion + decoder (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5;
Kingma et al. 2021, eq. 11): the KL divergence of x_1 from the Gaussian that sampling starts from,
those of the steps in between, and the cost of x_0 given the least noised x. Terms are per example,
sums over all dimensions in nats; `bits_per_dim` turns them into bits.

All follows from Gaussian conditionals between two pairs (alpha, sigma) of one process, arrays [] or
[b]: `here` is the noisier one (t), `there` the cleaner one (s < t). With
alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2,
x_t = alpha_{t|s} x_s + sigma_{t|s} eps. Between neighbours of a DDPM alpha_{t|s}^2 = 1 - beta_t
and sigma_{t|s}^2 = beta_t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.losses import Weighting, add_noise, total
from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.diffusion.processes import Process, log_snr_rate, time_derivative
from diffusion_jax.diffusion.samplers.common import Pair, unit_noise
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.types import Latents, PerExample


def transition(here: Pair, there: Pair) -> tuple[jax.Array, jax.Array]:
  """(alpha_{t|s}, sigma_{t|s}^2) of q(x_t | x_s) (Kingma et al. 2021, appendix A)."""
  (alpha, sigma), (alpha_there, sigma_there) = here, there
  ratio = divide(alpha, alpha_there)
  kept = ratio * sigma_there
  return ratio, jnp.maximum((sigma - kept) * (sigma + kept), 0.0)


def posterior(x: jax.Array, x0: jax.Array, here: Pair, there: Pair) -> tuple[jax.Array, jax.Array]:
  """(mean [b ...], variance [] or [b]) of q(x_s | x_t, x_0), finite at alpha_t = 0 and sigma_s = 0.

  mean = alpha_{t|s} sigma_s^2 / sigma_t^2 x_t + alpha_s sigma_{t|s}^2 / sigma_t^2 x_0, variance =
  sigma_{t|s}^2 sigma_s^2 / sigma_t^2 (Ho et al. 2020, eq. 6 and 7; Kingma et al. 2021, A).
  """
  ratio, added = transition(here, there)
  fraction = divide(there[1] ** 2, here[1] ** 2)
  of_x0 = there[0] * divide(added, here[1] ** 2)
  return expand(ratio * fraction, x) * x + expand(of_x0, x) * x0, added * fraction


def log_variances(grid: Grid) -> tuple[jax.Array, jax.Array]:
  """(ln of the posterior's variance [n], ln sigma_{t|s}^2 [n]) for a grid's n steps, n >= 2.

  The bounds of a sampler's optimal variance (Nichol & Dhariwal 2021, section 3.1): beta_tilde for
  data without spread ("fixed small"), beta for unit Gaussian data ("fixed large"). A last step to
  sigma = 0, without posterior variance, takes that of the step before.
  """
  alphas, sigmas = (jnp.asarray(values) for values in grid)
  _, upper = transition((alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:]))
  lower = upper * divide(sigmas[1:] ** 2, sigmas[:-1] ** 2)
  lower = lower.at[-1].set(jnp.where(sigmas[-1] > 0, lower[-1], jnp.minimum(lower[-2], upper[-1])))
  floor = jnp.finfo(upper.dtype).tiny
  return jnp.log(jnp.maximum(lower, floor)), jnp.log(jnp.maximum(upper, floor))


def learned_log_variance(output: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
  """ln variance = v upper + (1 - v) lower, v = (output + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

  output [b ...]: extra channels of the network. lower, upper: [] or [b], of `log_variances`.
  """
  fraction = (output + 1) / 2
  return fraction * expand(upper, output) + (1 - fraction) * expand(lower, output)


Decoder = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_0 [b ...], mean [b ...], ln variance, broadcastable) -> ln p(x_0) [b ...], per dimension."""


def bits_per_dim(nats: PerExample, like: jax.Array) -> PerExample:
  """Nats per example -> bits per dimension of `like` [b ...]."""
  return nats / (like[0].size * jnp.log(2.0))


def gaussian_kl(mean, log_variance, mean_2, log_variance_2) -> jax.Array:
  """KL(N(mean, variance) | N(mean_2, variance_2)) per dimension, broadcasting."""
  difference = log_variance - log_variance_2
  return (jnp.expm1(difference) - difference + (mean - mean_2) ** 2 * jnp.exp(-log_variance_2)) / 2


def gaussian_log_density(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """ln N(x_0; mean, variance) per dimension: the decoder of continuous data."""
  scaled = (x0 - mean) ** 2 * jnp.exp(-log_variance)
  return -(scaled + log_variance + jnp.log(2 * jnp.pi)) / 2


def discretized_gaussian(
  x0: jax.Array, mean: jax.Array, log_variance: jax.Array, levels: int = 256
) -> jax.Array:
  """ln of the Gaussian's mass in the bin around x_0, per dimension (Ho et al. 2020, eq. 13).

  The bins of `levels` equally spaced values in [-1, 1]; the outer two reach to infinity. Computed
  as ln(e^a - e^b) on ln Phi in the accurate tail, so that no mass underflows to 0.
  """
  half = 1 / (levels - 1)
  scale = jnp.exp(-log_variance / 2)
  upper, lower = (x0 - mean + half) * scale, (x0 - mean - half) * scale
  # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): the side on which both are below one half or straddle it.
  flip = lower + upper > 0
  upper_, lower_ = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
  high, low = log_ndtr(upper_), log_ndtr(lower_)
  tiny = jnp.finfo(high.dtype).tiny
  middle = high + jnp.log(jnp.maximum(-jnp.expm1(jnp.minimum(low - high, -tiny)), tiny))
  edge = 1 - half
  return jnp.where(x0 > edge, log_ndtr(-lower), jnp.where(x0 < -edge, log_ndtr(upper), middle))


def prior_term(
  x0: jax.Array, alpha: jax.Array, sigma: jax.Array, prior_std: jax.Array = 1.0
) -> PerExample:
  """KL(q(x_T | x_0) | N(0, prior_std^2)) [b]; alpha and sigma, [] or [b], are the last level's."""
  sigma, prior_std = expand(sigma, x0), jnp.asarray(prior_std, x0.dtype)
  zeros = jnp.zeros_like(x0)
  mean, log_variance = expand(alpha, x0) * x0, 2 * jnp.log(sigma) + zeros
  return total(gaussian_kl(mean, log_variance, zeros, 2 * jnp.log(prior_std)))


def bound_term(
  x0: jax.Array, x: jax.Array, estimate: jax.Array, here: Pair, there: Pair,
  log_variance: jax.Array, decoder: Decoder = discretized_gaussian,
) -> PerExample:
  """KL(q(x_s | x_t, x_0) | p(x_s | x_t)) [b]; at sigma_s = 0 -ln p(x_0 | x_t) by the decoder.

  L_{t-1} and L_0 of Ho et al. 2020, eq. 5; p has the posterior's mean at the estimate of x_0. x:
  x_t [b ...]. estimate: of x_0 [b ...]. here, there: levels t and s, [] or [b]. log_variance: of
  p(x_s | x_t), [] or [b] or [b ...]; see `log_variances`.
  """
  true_mean, variance = posterior(x, x0, here, there)
  mean, _ = posterior(x, estimate, here, there)
  log_variance = expand(log_variance, x0)
  floor = jnp.finfo(x0.dtype).tiny
  true_log_variance = expand(jnp.log(jnp.maximum(variance, floor)), x0)
  last = expand(there[1], x0) <= 0
  kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
  return total(jnp.where(last, -decoder(x0, mean, log_variance), kl))


def vdm_loss(
  denoise: Denoiser, process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array,
  weighting: Weighting | None = None,
) -> PerExample:
  """-1/2 (d log-SNR / dt) |eps - eps_hat|^2 [b]: the bound's diffusion term, T -> infinity.

  Equals -1/2 SNR'(t) |x_0 - estimate|^2 (Kingma et al. 2021, eq. 17); its mean over t in [0, 1] is
  the term, and depends on the process through the end points of its log-SNR alone.

  A weighting gives a weighted bound (Kingma & Gao 2023, eq. 6): the weight on x_0's error over SNR;
  'snr' is the bound itself. t is [b].
  """
  (alpha, sigma), _ = time_derivative(process, t)
  factor = -log_snr_rate(process, t) / 2
  estimate = denoise(add_noise(x0, eps, alpha, sigma), alpha, sigma)
  loss = factor * total((expand(divide(alpha, sigma), x0) * (x0 - estimate)) ** 2)
  if weighting is None:
    return loss
  snr = divide(alpha, sigma) ** 2
  return weighting(snr) / snr * loss


def stratified_times(process: Process, fractions: jax.Array, t_min: float, floor: float):
  """Times [n] that divide the range of log(floor + SNR) over [t_min, 1] at fractions [n].

  By bisection, as the SNR falls with t. A floor above 0 makes the range finite for processes that
  end in pure noise; a large one puts most times where there is much signal.
  """
  def value(t):
    alpha, sigma = process(t)
    return jnp.log(alpha**2 + floor * sigma**2) - 2 * jnp.log(sigma)

  low, high = jnp.asarray(t_min, fractions.dtype), jnp.ones((), fractions.dtype)
  wanted = value(low) + fractions * (value(high) - value(low))

  def halve(_, ends):
    low, high = ends
    # Between times of different magnitude the geometric mean is the better middle.
    middle = jnp.where(low > 0, jnp.sqrt(low * high), high / 2)
    middle = jnp.where(high > 2 * low, middle, (low + high) / 2)
    early = value(middle) > wanted
    return jnp.where(early, middle, low), jnp.where(early, high, middle)

  ends = jnp.broadcast_to(low, fractions.shape), jnp.broadcast_to(high, fractions.shape)
  low, high = jax.lax.fori_loop(0, 80, halve, ends)
  times = jnp.where(fractions <= 0, t_min, (low + high) / 2)
  return jnp.where(fractions >= 1, 1.0, times)


class Bound(NamedTuple):
  """Terms of a bound, [b] each, in bits per dimension."""

  prior: PerExample
  diffusion: PerExample
  decoder: PerExample

  @property
  def total(self) -> PerExample:
    return self.prior + self.diffusion + self.decoder


def discrete_bound(
  denoise: Denoiser, x0: Latents, alphas: jax.Array, sigmas: jax.Array, keys: jax.Array, *,
  draws: int | None = None, offset: float | jax.Array = 0.5,
) -> Bound:
  """The bound of a model of T steps (Ho et al. 2020, eq. 5).

  Each KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) with the posterior's variance is
  (SNR(t-1) - SNR(t)) |x_0 - D|^2 / 2 (Kingma et al. 2021, section 4).

  Args:
    alphas, sigmas: [T], from data to noise.
    draws: None evaluates each of the T - 1 steps once. A number takes as many, each with noise of
      its own and evenly spread over the divergences that they would have for unit Gaussian data.
      Each costs one network call.
    offset: where in its stratum each of them lies, in [0, 1); uniformly random it makes the
      estimate unbiased, 0.5 makes it repeatable.
  """
  alphas, sigmas = jnp.asarray(alphas, x0.dtype), jnp.asarray(sigmas, x0.dtype)
  snr = (alphas / sigmas) ** 2
  gain = snr[:-1] - snr[1:]

  def divergence(index, noise_index):
    alpha, sigma = alphas[index + 1], sigmas[index + 1]
    return gain[index] * _error(denoise, x0, alpha, sigma, keys, noise_index) / 2

  chosen, weights = spread_steps(alphas, sigmas, draws, offset)
  items = (chosen, jnp.arange(1, len(chosen) + 1), weights)
  add = lambda nats, item: (nats + item[2] * divergence(*item[:2]), None)
  nats, _ = jax.lax.scan(add, jnp.zeros(len(x0), x0.dtype), items)
  return _bound(denoise, x0, nats, (alphas[0], sigmas[0]), (alphas[-1], sigmas[-1]), keys)


def spread_steps(
  alphas: jax.Array, sigmas: jax.Array, draws: int | None, offset: float | jax.Array = 0.5
) -> tuple[jax.Array, jax.Array]:
  """Return (steps [n] of 0 to T - 2, the weight [n] of each in a sum); i is from level i + 1 to i.

  All of them for draws None; else so many, evenly spread over the divergences that they would have
  for unit Gaussian data, each at `offset` within its stratum.
  """
  snr = (alphas / sigmas) ** 2
  gain = snr[:-1] - snr[1:]
  if draws is None:
    return jnp.arange(len(gain)), jnp.ones_like(gain)
  parts = gain / (1 + snr[1:])
  fractions = jnp.cumsum(parts)
  chosen = jnp.searchsorted(fractions, (jnp.arange(draws) + offset) / draws * fractions[-1])
  chosen = jnp.minimum(chosen, len(gain) - 1)
  return chosen, fractions[-1] / draws / parts[chosen]


def continuous_bound(
  denoise: Denoiser, x0: Latents, process: Process, keys: jax.Array, *, draws: int = 128,
  offset: float | jax.Array = 0.5, t_min: float = 1e-5,
) -> Bound:
  """The bound of a model in continuous time (Kingma et al. 2021, eq. 18).

  The diffusion term, half the integral of |x_0 - D|^2 over the SNR, depends on the process's ends
  only. It is taken over l = log(1 + SNR), which is finite at zero terminal SNR too: the integrand
  |x_0 - D|^2 (1 + SNR) / 2 is constant on average for unit Gaussian data.

  draws: noise levels, one network call each, evenly spread over l; offset: as in `discrete_bound`.
  t_min: where data begins; sigma must be above 0 there.
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
  return _bound(denoise, x0, nats * (length / draws), *ends, keys)


def _error(denoise, x0, alpha, sigma, keys, index) -> PerExample:
  """|x_0 - D(alpha x_0 + sigma eps)|^2 with the index-th noise of each key."""
  x = alpha * x0 + sigma * unit_noise(keys, index, x0)
  return total((x0 - denoise(x, alpha, sigma)) ** 2)


def _bound(denoise, x0, diffusion, first, last, keys) -> Bound:
  """Add the two end terms, at the least and the most noised (alpha, sigma).

  The end's Gaussian has the deviation sqrt(alpha^2 + sigma^2), 1 for VP. The decoder is N(x_0; x /
  alpha, sigma^2 / alpha^2), a density of continuous x_0.
  """
  alpha, sigma = first
  x = alpha * x0 + sigma * unit_noise(keys, 0, x0)
  prior = prior_term(x0, *last, jnp.hypot(*last))
  decoder = -total(gaussian_log_density(x0, x / alpha, 2 * jnp.log(sigma / alpha)))
  return Bound(*(bits_per_dim(term, x0) for term in (prior, diffusion, decoder)))


def gaussian_bits(
  x0: np.ndarray, mean: np.ndarray, variance: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray
) -> dict[str, np.ndarray]:
  """Expected -log2 p(x_0) per dimension, [b] each, of the model N(mean, diag(variance)).

  With s the SNR and r^2 = (x_0 - mean)^2, the ideal denoiser's expected squared error is
  (r^2 + s variance^2) / (1 + s variance)^2 per entry. 'discrete' is `discrete_bound` over
  all steps, 'continuous' is `continuous_bound` between the ends of the table, 'flow' is
  `likelihood.flow_likelihood` with start_noise. The last two agree where the last step holds no
  signal: -log2 of the density of x_0 + sigma / alpha eps.
  x0 is [b ...], mean and variance [...], alphas and sigmas [T], from data to noise.
  """
  x0, mean, variance = (np.asarray(part, np.float64) for part in (x0, mean, variance))
  snr = (np.asarray(alphas) / np.asarray(sigmas)) ** 2
  first, last, square = snr[0], snr[-1], (x0 - mean) ** 2
  spread = alphas[-1] ** 2 + sigmas[-1] ** 2  # variance of the Gaussian that sampling starts from
  fraction = sigmas[-1] ** 2 / spread
  prior = ((alphas[-1] * x0) ** 2 / spread + fraction - 1 - np.log(fraction)) / 2
  ends = prior + (np.log(2 * np.pi / first) + 1) / 2
  below = lambda s: 1 + s * variance
  steps = list(zip(snr[:-1] - snr[1:], snr[1:], strict=True))
  of_square = sum(gain / below(s) ** 2 for gain, s in steps)
  rest = sum(gain * s * (variance / below(s)) ** 2 for gain, s in steps)
  integral = square * (first - last) / (below(first) * below(last))
  integral = integral + np.log(below(first) / below(last)) + 1 / below(first) - 1 / below(last)
  nats = {
    'discrete': ends + (square * of_square + rest) / 2,
    'continuous': ends + integral / 2,
    'flow': _flow_nats(x0, mean, variance, alphas, sigmas, spread),
  }
  axes = tuple(range(1, x0.ndim))
  return {name: value.mean(axis=axes) / np.log(2) for name, value in nats.items()}


def _flow_nats(x0, mean, variance, alphas, sigmas, spread):
  """Nats per entry: the flow stretches each entry's deviation from the mean by one number."""
  at = lambda i: alphas[i] ** 2 * variance + sigmas[i] ** 2
  stretch = np.sqrt(at(-1) / at(0))
  end = alphas[-1] * mean + stretch * alphas[0] * (x0 - mean)
  square = end**2 + (stretch * sigmas[0]) ** 2
  return (np.log(2 * np.pi * spread) + square / spread) / 2 - np.log(stretch * alphas[0])
