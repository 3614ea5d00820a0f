"""What a network predicts, and how any prediction becomes an estimate of the clean sample x_0.

With x = alpha x_0 + sigma eps, each prediction y is a combination of x_0 and eps:
  epsilon          eps                        Ho et al. 2020, eq. 14
  sample           x_0
  v_prediction     alpha eps - sigma x_0      Salimans & Ho 2022, appendix D
  score            -eps / sigma               Song & Ermon 2019; grad_x ln p(x | x_0)
  edm              (x_0 - c_skip x) / c_out   Karras et al. 2022, eq. 7
  flow_prediction  eps - x_0                  Liu et al. 2023; dx/dt of `processes.flow`

x and y together determine x_0 and eps, except where x holds no signal or no noise and y does not
tell the missing one: epsilon and score at alpha = 0, sample at sigma = 0. There conversions
return finite numbers without meaning.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents, Text

PREDICTIONS = ('epsilon', 'sample', 'v_prediction', 'score', 'edm', 'flow_prediction')

BLIND_AT_ZERO_SNR = ('epsilon', 'score')
"""Predictions that say nothing of x_0 where alpha = 0."""

MAX_LOG_SNR = 20.0
"""Weights and labels see log-SNRs within +-20, so that both ends stay finite in float32."""

Denoiser = Callable[[Latents, jax.Array, jax.Array], Latents]
"""D(x [b h w c], alpha [], sigma []) -> estimate of x_0 [b h w c]."""

TextDenoiser = Callable[[Latents, jax.Array, jax.Array, Text], Latents]
"""The same, conditioned on text [b l d]."""


def expand(value: jax.Array, like: jax.Array) -> jax.Array:
  """[b] or [] -> broadcastable against `like` [b ...]."""
  value = jnp.asarray(value)
  return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """numerator / denominator; a denominator within tiny^(1/4) of 0 (3e-10 in float32) is that."""
  numerator, denominator = jnp.asarray(numerator), jnp.asarray(denominator)
  floor = float(jnp.finfo(jnp.result_type(numerator, denominator)).tiny) ** 0.25
  return numerator / jnp.where(jnp.abs(denominator) < floor, floor, denominator)


def clamp_log_snr(alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The pair with its smaller member raised so that |log-SNR| <= MAX_LOG_SNR."""
  alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
  ratio = math.exp(-MAX_LOG_SNR / 2)
  return jnp.maximum(alpha, ratio * sigma), jnp.maximum(sigma, ratio * alpha)


def _combination(prediction: str, alpha, sigma, data_std: float):
  """(p, q, scale) with scale y = p x_0 + q eps."""
  if prediction not in PREDICTIONS:
    raise UserError(
      f'prediction {prediction!r} is unknown; choose one of {", ".join(PREDICTIONS)}.'
    )
  one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
  spread = jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
  return {
    'epsilon': (zero, one, one),
    'sample': (one, zero, one),
    'v_prediction': (-sigma, alpha, one),
    'score': (zero, -one, sigma),
    'edm': (sigma, -alpha * data_std**2, spread * data_std),
    'flow_prediction': (-one, one, one),
  }[prediction]


def target(prediction: str, x0, eps, alpha, sigma, data_std: float = 1.0) -> jax.Array:
  """What the network is asked to output [b ...]; alpha and sigma are [b] or [].

  Args:
    data_std: standard deviation of the data, for 'edm' alone; 0.5 in Karras et al.
  """
  alpha, sigma = expand(alpha, x0), expand(sigma, x0)
  p, q, scale = _combination(prediction, alpha, sigma, data_std)
  return divide(p * x0 + q * eps, scale)


def to_pair(
  prediction: str, output, x, alpha, sigma, data_std: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """(x_0 [b ...], eps [b ...]) from the network's output: the 2x2 system of x and y solved.

  alpha x_0 + sigma eps = x wherever both are determined.
  """
  alpha, sigma = expand(alpha, x), expand(sigma, x)
  p, q, scale = _combination(prediction, alpha, sigma, data_std)
  output = scale * output
  determinant = alpha * q - sigma * p
  # Where y holds one of the two alone, its own value needs no solving and no division.
  x0 = output if prediction == 'sample' else divide(q * x - sigma * output, determinant)
  eps = output / q if prediction in BLIND_AT_ZERO_SNR else divide(
    alpha * output - p * x, determinant
  )
  return x0, eps


def to_x0(prediction: str, output, x, alpha, sigma, data_std: float = 1.0) -> jax.Array:
  """Estimate of x_0 from the network's output."""
  return to_pair(prediction, output, x, alpha, sigma, data_std)[0]


def convert(
  prediction: str, wanted: str, output, x, alpha, sigma, data_std: float = 1.0
) -> jax.Array:
  """The output [b ...] that a network of another parameterisation would have given."""
  x0, eps = to_pair(prediction, output, x, alpha, sigma, data_std)
  return target(wanted, x0, eps, alpha, sigma, data_std)


def gain(prediction: str, alpha: jax.Array, sigma: jax.Array, data_std: float = 1.0) -> jax.Array:
  """d x_0 / d output at fixed x, of alpha's shape: error in x_0 per error in the prediction.

  One rule for all: -sigma scale / (alpha q - sigma p) in the terms of `_combination`; the log-SNR
  is clamped, so that it is finite everywhere.
  """
  alpha, sigma = clamp_log_snr(alpha, sigma)
  p, q, scale = _combination(prediction, alpha, sigma, data_std)
  return -sigma * scale / (alpha * q - sigma * p)


class Preconditioning(NamedTuple):
  """D(x) = skip x + out F(scale x, noise), each [] or [b]."""

  skip: jax.Array
  out: jax.Array
  scale: jax.Array
  noise: jax.Array


def preconditioning(alpha: jax.Array, sigma: jax.Array, data_std: float = 1.0) -> Preconditioning:
  """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, for any alpha.

  Theirs is alpha = 1; x / alpha and sigma / alpha carry it over. With alpha^2 + sigma^2 = 1 and
  data_std = 1, F is -v. c_noise = ln(sigma / alpha) / 4, within +-2.5.
  """
  alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
  spread = jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
  return Preconditioning(
    skip=alpha * data_std**2 / spread**2, out=sigma * data_std / spread, scale=1 / spread,
    noise=noise_label(alpha, sigma),
  )


def noise_label(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """ln(sigma / alpha) / 4, within +-2.5: what a network may be told instead of a timestep."""
  alpha, sigma = clamp_log_snr(alpha, sigma)
  return (jnp.log(sigma) - jnp.log(alpha)) / 4


def network_denoiser(
  network: Callable[[jax.Array, jax.Array], jax.Array], prediction: str,
  label: Callable[[jax.Array, jax.Array], jax.Array] = noise_label, *,
  data_std: float = 1.0, scale_input: bool = False, variance: bool = False,
) -> Denoiser:
  """Wraps `network(x, label [b])` as a denoiser; computes in x's dtype outside the network.

  An output of twice x's channels holds a learned variance, too, which is left out unless wanted.

  Args:
    label: (alpha, sigma) -> what the network is told of the noise, such as `Schedule.timestep`.
    scale_input: whether the network sees c_in x, of unit variance at every noise level.
    variance: return (x_0, share), share [b ...] in [0, 1] of the larger variance (Nichol & Dhariwal
      2021, eq. 15), as `samplers.ddpm` takes it.
  """

  def denoise(x, alpha, sigma):
    c_in = preconditioning(alpha, sigma, data_std).scale if scale_input else 1.0
    told = jnp.broadcast_to(label(alpha, sigma), x.shape[:1])
    output = network(expand(c_in, x) * x if scale_input else x, told).astype(x.dtype)
    output, more = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
    x0 = to_x0(prediction, output, x, alpha, sigma, data_std)
    return (x0, jnp.clip((more + 1) / 2, 0, 1)) if variance else x0

  return denoise


def text_denoiser(
  network: Callable[[Latents, jax.Array, Text], Latents], schedule: Schedule, prediction: str,
  variance: bool = False, label: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> TextDenoiser:
  """Wraps `network(x, t [b], text)` as a denoiser; see `network_denoiser`.

  Args:
    label: (alpha [], sigma []) -> t []; the schedule's own timestep if not given.
  """

  def denoise(x, alpha, sigma, text):
    told = lambda x, t: network(x, t, text)
    return network_denoiser(
      told, prediction, label or schedule.timestep, scale_input=prediction == 'edm',
      variance=variance,
    )(x, alpha, sigma)

  return denoise
