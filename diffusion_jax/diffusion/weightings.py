"""Weights on the loss by noise level.

Each weighting is defined once, as a weight on the squared error in x_0 as a function of
SNR = alpha^2 / sigma^2. On the squared error of another prediction it is that weight times
(d x_0 / d prediction)^2, `denoiser.gain`: the one rule of `weight`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import clamp_log_snr, gain
from diffusion_jax.errors import UserError
from diffusion_jax.types import PerExample

Weighting = Callable[[jax.Array], jax.Array]
"""SNR [...] -> weight [...] on the squared error in x_0."""


def uniform() -> Weighting:
  """1 on x_0's error."""
  return jnp.ones_like


def snr() -> Weighting:
  """SNR: 1 on epsilon's error, the simple loss of Ho et al. 2020, eq. 14."""
  return lambda value: value


def truncated_snr() -> Weighting:
  """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
  return lambda value: jnp.maximum(value, 1.0)


def snr_plus_one() -> Weighting:
  """SNR + 1: 1 on v's error (Salimans & Ho 2022, section 4)."""
  return lambda value: value + 1


def min_snr(gamma: float = 5.0) -> Weighting:
  """min(SNR, gamma) (Hang et al. 2023, eq. 8)."""
  return lambda value: jnp.minimum(value, gamma)


def soft_min_snr(gamma: float = 4.0) -> Weighting:
  """SNR gamma / (SNR + gamma) = 1 / (1 / SNR + 1 / gamma) (Crowson et al. 2024, section 3.3)."""
  return lambda value: value * gamma / (value + gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
  """SNR / (k + SNR)^gamma: 1 / (k + SNR)^gamma on epsilon's error (Choi et al. 2022, eq. 8)."""
  return lambda value: value / (k + value) ** gamma


def edm(data_std: float = 0.5) -> Weighting:
  """SNR + 1 / data_std^2 = (sigma^2 + s^2) / (sigma s)^2 at alpha = 1 (Karras et al. 2022, t. 1).

  1 on the error of the 'edm' prediction with that data_std.
  """
  return lambda value: value + 1 / data_std**2


def sigmoid(bias: float = 0.0) -> Weighting:
  """sigmoid(bias - ln SNR) on epsilon's error (Kingma & Gao 2023; Hoogeboom et al. 2024).

  SNR e^bias / (SNR + e^bias) on x_0's error: `soft_min_snr` with gamma = e^bias.
  """
  return lambda value: value * jax.nn.sigmoid(bias - jnp.log(value))


def debiased() -> Weighting:
  """sqrt(SNR): 1 / sqrt(SNR) on epsilon's error (Yu et al. 2023, eq. 11)."""
  return jnp.sqrt


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
  'uniform': uniform,
  'snr': snr,
  'truncated_snr': truncated_snr,
  'snr_plus_one': snr_plus_one,
  'min_snr': min_snr,
  'soft_min_snr': soft_min_snr,
  'p2': p2,
  'edm': edm,
  'sigmoid': sigmoid,
  'debiased': debiased,
}


def weighting(name: str, **options) -> Weighting:
  """The weighting of that name; options are its constructor's, such as gamma=5.

  Raises:
    UserError: for a name that is not in the table.
  """
  if name not in WEIGHTINGS:
    raise UserError(f'weighting {name!r} is unknown; choose one of {", ".join(WEIGHTINGS)}.')
  return WEIGHTINGS[name](**options)


def weight(
  weighting: Weighting, prediction: str, alpha: jax.Array, sigma: jax.Array, data_std: float = 1.0
) -> PerExample:
  """Weight [b] on the squared error of `prediction` that is `weighting` on x_0's.

  Finite at alpha = 0 and sigma = 0: both factors see a log-SNR within +-20
  (`denoiser.MAX_LOG_SNR`), whose end values stand for the limits.

  Args:
    alpha, sigma: [b].
    data_std: for the prediction 'edm' alone.
  """
  alpha, sigma = clamp_log_snr(alpha, sigma)
  return weighting((alpha / sigma) ** 2) * gain(prediction, alpha, sigma, data_std) ** 2
