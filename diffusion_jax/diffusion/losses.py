"""Training losses of a denoising network, one value per example, and their weights by noise level.

A weighting is defined once, as a weight on the squared error in x_0 as a function of SNR = alpha^2
/ sigma^2. On the squared error of another prediction it is that weight times (d x_0 / d
prediction)^2, `Parameterization.gain`: the one rule of `weight`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax import registry
from diffusion_jax.diffusion.parameterization import Parameterization, clamp_log_snr, expand
from diffusion_jax.types import Latents, PerExample

Weighting = Callable[[jax.Array], jax.Array]
"""SNR [...] -> weight [...] on the squared error in x_0."""

WEIGHTINGS: dict[str, Callable[..., jax.Array]] = {
  # 1 on x_0's error, and 1 on epsilon's: the simple loss of Ho et al. 2020, eq. 14.
  'uniform': lambda snr: jnp.ones_like(snr),
  'snr': lambda snr: snr,
  # Salimans & Ho 2022, section 4; the second is 1 on v's error.
  'truncated_snr': lambda snr: jnp.maximum(snr, 1.0),
  'snr_plus_one': lambda snr: snr + 1,
  # Hang et al. 2023, eq. 8; Crowson et al. 2024, section 3.3: 1 / (1 / SNR + 1 / gamma).
  'min_snr': lambda snr, gamma=5.0: jnp.minimum(snr, gamma),
  'soft_min_snr': lambda snr, gamma=4.0: snr * gamma / (snr + gamma),
  # 1 / (k + SNR)^gamma on epsilon's error (Choi et al. 2022, eq. 8).
  'p2': lambda snr, gamma=1.0, k=1.0: snr / (k + snr) ** gamma,
  # (sigma^2 + s^2) / (sigma s)^2 at alpha = 1, 1 on the error of 'edm' (Karras et al. 2022, t. 1).
  'edm': lambda snr, data_std=0.5: snr + 1 / data_std**2,
  # sigmoid(bias - ln SNR) on epsilon's error (Kingma & Gao 2023; Hoogeboom et al. 2024).
  'sigmoid': lambda snr, bias=0.0: snr * jax.nn.sigmoid(bias - jnp.log(snr)),
  # 1 / sqrt(SNR) on epsilon's error (Yu et al. 2023, eq. 11).
  'debiased': lambda snr: jnp.sqrt(snr),
}
"""Weightings by name: functions of the SNR and of their options."""


def weighting(name: str, **options) -> Weighting:
  """The weighting of that name with options, such as gamma=5; or UserError."""
  return partial(WEIGHTINGS[registry.check(WEIGHTINGS, name, 'weighting')], **options)


def weight(
  weighting: Weighting, parameterization: Parameterization, alpha: jax.Array, sigma: jax.Array
) -> PerExample:
  """Weight [b] on a prediction's squared error equal to `weighting` on x_0's; alpha, sigma [b].

  Finite at alpha = 0 and sigma = 0: log-SNRs are clamped to +-MAX_LOG_SNR.
  """
  alpha, sigma = clamp_log_snr(alpha, sigma)
  return weighting((alpha / sigma) ** 2) * parameterization.gain(alpha, sigma) ** 2


def total(values: jax.Array) -> PerExample:
  """Sum over all but the first axis."""
  return values.reshape(len(values), -1).sum(1)


def sliced_score_matching(
  score: Callable[[jax.Array], jax.Array], x: jax.Array, directions: jax.Array
) -> PerExample:
  """v^T (d score / d x) v + 1/2 |score|^2 [b] (Song et al. 2019, eq. 9).

  Equals denoising score matching up to a constant, without noise levels: x [b ...] are samples of
  the distribution whose score, [b ...] -> [b ...] example by example, is wanted. directions: v
  [b ...] with E[v v^T] = 1, such as standard normals or random signs.
  """
  # v^T J, not J v: networks have layers whose derivatives are written for this direction alone.
  value, pull = jax.vjp(score, x)
  slope, = pull(directions)
  return total(directions * slope) + total(value**2) / 2


def add_noise(x0: Latents, eps: Latents, alpha: jax.Array, sigma: jax.Array) -> Latents:
  """x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
  return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def offset_noise(key: jax.Array, shape: tuple[int, ...], strength: float) -> Latents:
  """Unit noise [b h w c] + strength * one Gaussian per image and channel (Guttenberg 2023)."""
  pixel_key, offset_key = jax.random.split(key)
  noise = jax.random.normal(pixel_key, shape)
  if strength:
    offset = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    noise += strength * jax.random.normal(offset_key, offset)
  return noise


def perturb_input(key: jax.Array, eps: Latents, strength: float) -> Latents:
  """eps + strength xi: the noise that makes x_t, while eps stays the target (Ning et al. 2023).

  Simulates, in training, the errors that sampling feeds back; the paper's strength is 0.1.
  """
  return eps + strength * jax.random.normal(key, eps.shape, eps.dtype) if strength else eps


Error = Callable[[jax.Array, jax.Array], PerExample]
"""(output [b ...], wanted [b ...]) -> [b], in float32 at least."""


def per_example(values: jax.Array) -> PerExample:
  """Mean over all but the first axis."""
  return values.mean(axis=tuple(range(1, values.ndim)))


def _difference(output: jax.Array, wanted: jax.Array) -> jax.Array:
  dtype = jnp.promote_types(jnp.result_type(output, wanted), jnp.float32)
  return output.astype(dtype) - wanted.astype(dtype)


def squared_error(output: jax.Array, wanted: jax.Array) -> PerExample:
  """Mean squared error, [b]."""
  return per_example(_difference(output, wanted) ** 2)


def pseudo_huber(output: jax.Array, wanted: jax.Array, delta: jax.Array) -> PerExample:
  """2 delta (sqrt(e^2 + delta^2) - delta): e^2 for small e, 2 delta |e| for large (Charbonnier).

  delta: [] or [b], positive; a large one approaches the squared error.
  """
  error = _difference(output, wanted)
  delta = expand(delta, error)
  return per_example(2 * delta * error**2 / (jnp.sqrt(error**2 + delta**2) + delta))


def huber_delta(t: jax.Array, last: float = 0.1) -> jax.Array:
  """delta(t) = last^t: 1 at t = 0 falling to `last` at t = 1 (Khrapov et al. 2024, section 4.2)."""
  return last**t


def weighted_loss(
  parameterization: Parameterization, output: jax.Array, x0: Latents, eps: Latents,
  alpha: jax.Array, sigma: jax.Array, weighting: Weighting | None = None, *,
  error: Error = squared_error,
) -> PerExample:
  """weight x error of a network's output for x = alpha x_0 + sigma eps, [b]; alpha, sigma [b].

  Without a weighting the simple loss (Ho et al. 2020, eq. 14); with 'flow_prediction' flow matching
  on straight paths (Lipman et al. 2023, eq. 23; Liu et al. 2023, eq. 1).
  """
  loss = error(output, parameterization.target(x0, eps, alpha, sigma))
  if weighting is None:
    return loss
  return weight(weighting, parameterization, alpha, sigma) * loss
