"""Predictions of a network, and how any prediction becomes an estimate of the clean sample x_0.

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

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax import registry

PREDICTIONS = ('epsilon', 'sample', 'v_prediction', 'score', 'edm', 'flow_prediction')

BLIND_AT_ZERO_SNR = ('epsilon', 'score')
"""Predictions that say nothing of x_0 where alpha = 0."""

RESCALE_SPACES = ('sample', 'epsilon', 'v_prediction')
"""Predictions whose deviation guidance can restore (`denoiser.classifier_free`)."""

MAX_LOG_SNR = 20.0
"""Weights and labels see log-SNRs within +-20, so that both ends stay finite in float32."""


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


def noise_label(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
  """Return c_noise = ln(sigma / alpha) / 4, within +-2.5 (Karras et al. 2022, table 1)."""
  alpha, sigma = clamp_log_snr(alpha, sigma)
  return (jnp.log(sigma) - jnp.log(alpha)) / 4


@dataclasses.dataclass(frozen=True)
class Parameterization:
  """The prediction of a network: one of PREDICTIONS. Model and objective hold the same object.

  In all methods x, x0, eps and output are [b ...], alpha and sigma [b] or []. data_std: standard
  deviation of the data, for 'edm' alone; 0.5 in Karras et al.
  """

  name: str = 'epsilon'
  data_std: float = 1.0

  def __post_init__(self):
    registry.check(PREDICTIONS, self.name, 'prediction')

  @property
  def blind_at_zero_snr(self) -> bool:
    """True if the prediction does not determine x_0 where alpha = 0."""
    return self.name in BLIND_AT_ZERO_SNR

  @property
  def scales_input(self) -> bool:
    """True if the network sees c_in x in place of x."""
    return self.name == 'edm'

  @property
  def rescale_space(self) -> str:
    """The quantity whose deviation guidance restores: one of RESCALE_SPACES."""
    return self.name if self.name in RESCALE_SPACES else 'sample'

  def _combination(self, alpha, sigma):
    """Return (p, q, scale) with scale y = p x_0 + q eps."""
    one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
    spread = jnp.sqrt((alpha * self.data_std) ** 2 + sigma**2)
    return {
      'epsilon': (zero, one, one),
      'sample': (one, zero, one),
      'v_prediction': (-sigma, alpha, one),
      'score': (zero, -one, sigma),
      'edm': (sigma, -alpha * self.data_std**2, spread * self.data_std),
      'flow_prediction': (-one, one, one),
    }[self.name]

  def scale_input(self, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """c_in x of Karras et al. 2022, table 1, for any alpha; unit variance at every noise level."""
    if not self.scales_input:
      return x
    variance = (jnp.asarray(alpha) * self.data_std) ** 2 + jnp.asarray(sigma) ** 2
    return expand(1 / jnp.sqrt(variance), x) * x

  def predict(
    self, network: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, alpha: jax.Array,
    sigma: jax.Array, label: jax.Array,
  ) -> jax.Array:
    """Return the prediction for x [b ...] at the noise level of `label` [b], by a network of both.

    A learned variance, in as many channels again, follows it.
    """
    return network(self.scale_input(x, alpha, sigma), label)

  def target(self, x0, eps, alpha, sigma) -> jax.Array:
    """Return what the network should output."""
    alpha, sigma = expand(alpha, x0), expand(sigma, x0)
    p, q, scale = self._combination(alpha, sigma)
    return divide(p * x0 + q * eps, scale)

  def to_pair(self, output, x, alpha, sigma) -> tuple[jax.Array, jax.Array]:
    """(x_0, eps) from the network's output: the 2x2 system of x and y, solved."""
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    p, q, scale = self._combination(alpha, sigma)
    output = scale * output
    determinant = alpha * q - sigma * p
    # Where y holds one of the two alone, its own value needs no solving and no division.
    x0 = output if self.name == 'sample' else divide(q * x - sigma * output, determinant)
    eps = output / q if self.blind_at_zero_snr else divide(alpha * output - p * x, determinant)
    return x0, eps

  def to_x0(self, output, x, alpha, sigma) -> jax.Array:
    """Return the estimate of x_0 from the network's output."""
    return self.to_pair(output, x, alpha, sigma)[0]

  def convert(self, wanted: str, output, x, alpha, sigma) -> jax.Array:
    """Return the output that a network of the prediction `wanted` would have given."""
    other = dataclasses.replace(self, name=wanted)
    return other.target(*self.to_pair(output, x, alpha, sigma), alpha, sigma)

  def gain(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """d x_0 / d output at fixed x, of alpha's shape.

    -sigma scale / (alpha q - sigma p) in the terms of `_combination`, with the log-SNR clamped, so
    finite everywhere.
    """
    alpha, sigma = clamp_log_snr(alpha, sigma)
    p, q, scale = self._combination(alpha, sigma)
    return -sigma * scale / (alpha * q - sigma * p)
