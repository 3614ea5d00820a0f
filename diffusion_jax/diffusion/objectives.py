"""Training losses of a denoising network, one value per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser, expand, target
from diffusion_jax.diffusion.processes import Process, time_derivative
from diffusion_jax.diffusion.weightings import Weighting, edm, weight
from diffusion_jax.types import Latents, PerExample

Error = Callable[[jax.Array, jax.Array], PerExample]
"""(output [b ...], wanted [b ...]) -> [b]."""


def add_noise(x0: Latents, eps: Latents, alpha: jax.Array, sigma: jax.Array) -> Latents:
  """x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
  return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def offset_noise(key: jax.Array, shape: tuple[int, ...], strength: float) -> Latents:
  """Unit Gaussian noise [b h w c] plus `strength` times one Gaussian per image and channel.

  The offset teaches the network to move the mean of an image (Guttenberg 2023).
  """
  pixel_key, offset_key = jax.random.split(key)
  noise = jax.random.normal(pixel_key, shape)
  if strength:
    offset = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    noise += strength * jax.random.normal(offset_key, offset)
  return noise


def perturb_input(key: jax.Array, eps: Latents, strength: float) -> Latents:
  """eps + strength xi: the noise that makes x_t, while eps stays the target (Ning et al. 2023).

  Imitates, in training, the errors that sampling feeds back; the paper's strength is 0.1.
  """
  return eps + strength * jax.random.normal(key, eps.shape, eps.dtype) if strength else eps


def per_example(values: jax.Array) -> PerExample:
  """Mean over all but the first axis."""
  return values.mean(axis=tuple(range(1, values.ndim)))


def _difference(output: jax.Array, wanted: jax.Array) -> jax.Array:
  """output - wanted, in float32 at least."""
  dtype = jnp.promote_types(jnp.result_type(output, wanted), jnp.float32)
  return output.astype(dtype) - wanted.astype(dtype)


def squared_error(output: jax.Array, wanted: jax.Array) -> PerExample:
  """Mean over all but the first axis, in float32 at least."""
  return per_example(_difference(output, wanted) ** 2)


def pseudo_huber(output: jax.Array, wanted: jax.Array, delta: jax.Array) -> PerExample:
  """2 delta (sqrt(e^2 + delta^2) - delta): e^2 for small e, 2 delta |e| for large (Charbonnier).

  delta is [] or [b], positive. The squared error is the limit of a large delta.
  """
  error = _difference(output, wanted)
  delta = expand(delta, error)
  return per_example(2 * delta * error**2 / (jnp.sqrt(error**2 + delta**2) + delta))


def huber_delta(t: jax.Array, last: float = 0.1) -> jax.Array:
  """delta(t) = last^t: 1 at t = 0 falling to `last` at t = 1 (Khrapov et al. 2024, section 4.2).

  Outliers count less where there is much noise, details keep their squared error.
  """
  return last**t


def weighted_loss(
  prediction: str, output: jax.Array, x0: Latents, eps: Latents, alpha: jax.Array,
  sigma: jax.Array, weighting: Weighting | None = None, *, data_std: float = 1.0,
  error: Error = squared_error,
) -> PerExample:
  """weight x error of a network's output, [b].

  Without a weighting this is the simple loss (Ho et al. 2020, eq. 14), and with 'flow_prediction'
  flow matching on straight paths (Lipman et al. 2023, eq. 23; Liu et al. 2023, eq. 1).

  Args:
    output: what the network gave for x = alpha x_0 + sigma eps; alpha and sigma are [b].
    weighting: a weight on x_0's error, carried over to this prediction's.
  """
  loss = error(output, target(prediction, x0, eps, alpha, sigma, data_std))
  if weighting is None:
    return loss
  return weight(weighting, prediction, alpha, sigma, data_std) * loss


def edm_loss(
  denoise: Denoiser, x0: Latents, eps: Latents, sigma: jax.Array, data_std: float = 0.5
) -> PerExample:
  """(sigma^2 + s^2) / (sigma s)^2 |D(x_0 + sigma eps) - x_0|^2 [b] (Karras et al. 2022, eq. 2, 8).

  sigma is [b], usually `timesteps.log_normal`; alpha is 1.
  """
  alpha = jnp.ones_like(sigma)
  error = squared_error(denoise(add_noise(x0, eps, alpha, sigma), alpha, sigma), x0)
  return weight(edm(data_std), 'sample', alpha, sigma) * error


def flow_matching_loss(
  velocity: Callable[[jax.Array, jax.Array], jax.Array], process: Process, x0: Latents,
  eps: Latents, t: jax.Array,
) -> PerExample:
  """|velocity(x_t, t) - (alpha' x_0 + sigma' eps)|^2 [b] on any path (Lipman et al. 2023, eq. 9).

  t is [b]. Its minimiser is the velocity of the probability-flow ODE, `sdes.velocity`.
  """
  (alpha, sigma), (alpha_rate, sigma_rate) = time_derivative(process, t)
  wanted = expand(alpha_rate, x0) * x0 + expand(sigma_rate, x0) * eps
  return squared_error(velocity(add_noise(x0, eps, alpha, sigma), t), wanted)
