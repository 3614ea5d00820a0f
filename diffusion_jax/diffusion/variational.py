"""Training on the variational bound of -ln p(x_0): its terms, per example in nats.

In T steps: prior, transitions and decoder (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5). In
continuous time: an integral (Kingma et al. 2021, eq. 17). A term is a sum over all dimensions;
`bits_per_dim` turns it into bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.losses import Weighting, add_noise, total
from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.diffusion.posterior import Level, posterior
from diffusion_jax.diffusion.processes import Process, log_snr_rate, time_derivative
from diffusion_jax.types import PerExample

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

  The bins of `levels` equally spaced values in [-1, 1]; the outer two reach to infinity. Uses
  ln(e^a - e^b) on ln Phi, in the tail that is accurate, so that no mass underflows to 0.
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
  return jnp.where(
    x0 > edge, log_ndtr(-lower), jnp.where(x0 < -edge, log_ndtr(upper), middle)
  )


def prior_term(
  x0: jax.Array, alpha: jax.Array, sigma: jax.Array, prior_std: jax.Array = 1.0
) -> PerExample:
  """KL(q(x_T | x_0) | N(0, prior_std^2)) [b]; alpha and sigma, [] or [b], are the last level's."""
  sigma, prior_std = expand(sigma, x0), jnp.asarray(prior_std, x0.dtype)
  zeros = jnp.zeros_like(x0)
  return total(gaussian_kl(
    expand(alpha, x0) * x0, 2 * jnp.log(sigma) + zeros, zeros, 2 * jnp.log(prior_std)
  ))


def bound_term(
  x0: jax.Array, x: jax.Array, estimate: jax.Array, here: Level, there: Level,
  log_variance: jax.Array, decoder: Decoder = discretized_gaussian,
) -> PerExample:
  """One term of the bound [b]: KL(q(x_s | x_t, x_0) | p(x_s | x_t)), or -ln p(x_0 | x_t).

  The second where sigma_s = 0, the decoder's term (Ho et al. 2020, eq. 5: L_{t-1} and L_0). p has
  the posterior's mean at the estimate of x_0.

  Args:
    x: x_t [b ...]; estimate: of x_0 [b ...].
    here, there: levels t and s, [] or [b].
    log_variance: of p(x_s | x_t), [] or [b] or [b ...]; see `posterior.log_variances`.
  """
  true_mean, variance = posterior(x, x0, here, there)
  mean, _ = posterior(x, estimate, here, there)
  log_variance = expand(log_variance, x0)
  floor = jnp.finfo(x0.dtype).tiny
  true_log_variance = expand(jnp.log(jnp.maximum(variance, floor)), x0)
  last = expand(there[1], x0) <= 0
  kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
  return total(jnp.where(last, -decoder(x0, mean, log_variance), kl))


def bound_loss(
  x0: jax.Array, x: jax.Array, estimate: jax.Array, here: Level, there: Level,
  log_variance: jax.Array, steps: int, last: Level, *, decoder: Decoder = discretized_gaussian,
  prior_std: float = 1.0,
) -> PerExample:
  """The whole bound [b] in nats, estimated from one uniformly drawn step: prior + steps x term.

  Arguments as in `bound_term`; last is the level of t = 1.
  """
  term = bound_term(x0, x, estimate, here, there, log_variance, decoder)
  return prior_term(x0, *last, prior_std) + steps * term


def hybrid_loss(
  simple: PerExample, x0: jax.Array, x: jax.Array, estimate: jax.Array, here: Level, there: Level,
  log_variance: jax.Array, steps: int, *, weight: float = 0.001,
  decoder: Decoder = discretized_gaussian,
) -> PerExample:
  """L_simple + weight L_vlb [b] (Nichol & Dhariwal 2021, eq. 16), L_vlb in bits per dimension.

  L_vlb = steps x the term of a uniformly drawn timestep. The gradient stops at the estimate: the
  bound trains the variance (`posterior.learned_log_variance`), the simple loss the mean.
  """
  frozen = jax.lax.stop_gradient(estimate)
  term = bound_term(x0, x, frozen, here, there, log_variance, decoder)
  return simple + weight * steps * bits_per_dim(term, x0)


def _epsilon_error(denoise: Denoiser, x0, eps, alpha, sigma) -> PerExample:
  """|eps - eps_hat|^2 [b], as the error in x_0 times alpha / sigma."""
  estimate = denoise(add_noise(x0, eps, alpha, sigma), alpha, sigma)
  return total((expand(divide(alpha, sigma), x0) * (x0 - estimate)) ** 2)


def vdm_loss(
  denoise: Denoiser, process: Process, x0: jax.Array, eps: jax.Array, t: jax.Array,
  weighting: Weighting | None = None,
) -> PerExample:
  """-1/2 (d log-SNR / dt) |eps - eps_hat|^2 [b]: the bound's diffusion term, T -> infinity.

  Equals -1/2 SNR'(t) |x_0 - estimate|^2 (Kingma et al. 2021, eq. 17); its mean over t in [0, 1] is
  the term, and depends on the process through the end points of its log-SNR alone.

  Args:
    t: [b], usually `timesteps.stratified`.
    weighting: for a weighted bound (Kingma & Gao 2023, eq. 6): the weight on x_0's error, in the
      convention of `weightings`, over SNR; `weightings.snr()` is the bound itself.
  """
  (alpha, sigma), _ = time_derivative(process, t)
  loss = -log_snr_rate(process, t) / 2 * _epsilon_error(denoise, x0, eps, alpha, sigma)
  if weighting is None:
    return loss
  snr = divide(alpha, sigma) ** 2
  return weighting(snr) / snr * loss
