"""Gaussian conditionals between two noise levels of one process.

A level is a pair (alpha, sigma), arrays [] or [b]. `here` is the noisier one (t), `there` the
cleaner one (s < t). With alpha_{t|s} = alpha_t / alpha_s and
sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2, x_t = alpha_{t|s} x_s + sigma_{t|s} eps. For
neighbouring levels of a DDPM alpha_{t|s}^2 = 1 - beta_t and sigma_{t|s}^2 = beta_t.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.diffusion.samplers.grid import Grid

Level = tuple[jax.Array, jax.Array]
"""(alpha, sigma) [] or [b]."""


def transition(here: Level, there: Level) -> tuple[jax.Array, jax.Array]:
  """(alpha_{t|s}, sigma_{t|s}^2) of q(x_t | x_s) (Kingma et al. 2021, appendix A)."""
  (alpha, sigma), (alpha_there, sigma_there) = here, there
  ratio = divide(alpha, alpha_there)
  kept = ratio * sigma_there
  return ratio, jnp.maximum((sigma - kept) * (sigma + kept), 0.0)


def posterior(
  x: jax.Array, x0: jax.Array, here: Level, there: Level
) -> tuple[jax.Array, jax.Array]:
  """(mean [b ...], variance [] or [b]) of q(x_s | x_t, x_0).

  mean = alpha_{t|s} sigma_s^2 / sigma_t^2 x_t + alpha_s sigma_{t|s}^2 / sigma_t^2 x_0,
  variance = sigma_{t|s}^2 sigma_s^2 / sigma_t^2 (Ho et al. 2020, eq. 6 and 7; Kingma et al. 2021,
  appendix A). Finite at alpha_t = 0 and at sigma_s = 0, where the mean is alpha_s x_0.
  """
  ratio, added = transition(here, there)
  share = divide(there[1] ** 2, here[1] ** 2)
  of_x0 = there[0] * divide(added, here[1] ** 2)
  return expand(ratio * share, x) * x + expand(of_x0, x) * x0, added * share


def log_variances(grid: Grid) -> tuple[jax.Array, jax.Array]:
  """(ln of the posterior's variance [n], ln sigma_{t|s}^2 [n]) for each of a grid's n steps.

  The bounds between which a sampler's optimal variance lies (Nichol & Dhariwal 2021, section 3.1):
  beta_tilde is right for data without spread ("fixed small"), beta for unit Gaussian data ("fixed
  large"). A last step to sigma = 0, whose posterior has no variance, takes that of the step before.

  Args:
    grid: (alphas [n+1], sigmas [n+1]) from noise to data, n >= 2.
  """
  alphas, sigmas = (jnp.asarray(values) for values in grid)
  _, upper = transition((alphas[:-1], sigmas[:-1]), (alphas[1:], sigmas[1:]))
  lower = upper * divide(sigmas[1:] ** 2, sigmas[:-1] ** 2)
  lower = lower.at[-1].set(jnp.where(sigmas[-1] > 0, lower[-1], jnp.minimum(lower[-2], upper[-1])))
  floor = jnp.finfo(upper.dtype).tiny
  return jnp.log(jnp.maximum(lower, floor)), jnp.log(jnp.maximum(upper, floor))


def learned_log_variance(output: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
  """ln variance = v upper + (1 - v) lower, v = (output + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

  Args:
    output: [b ...], the network's extra channels; -1 is the lower bound, 1 the upper one.
    lower, upper: [] or [b], from `log_variances`.
  """
  share = (output + 1) / 2
  return share * expand(upper, output) + (1 - share) * expand(lower, output)
