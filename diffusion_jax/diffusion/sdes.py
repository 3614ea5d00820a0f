"""Stochastic differential equations dx = f(x, t) dt + g(t) dw, all derived from a process.

A process t -> (alpha, sigma) has the forward SDE with f = (d ln alpha / dt) x and
g^2 = d sigma^2 / dt - 2 (d ln alpha / dt) sigma^2 (Lu et al. 2022, section 2.1). The reverse SDE
and the probability-flow ODE follow from that SDE and the score. x is [b ...] and t is [] or [b]; a
score is `score(x, t) -> grad_x ln p_t(x)`, of x's shape.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.denoiser import Denoiser, divide, expand
from diffusion_jax.diffusion.processes import Process, drift_rate, time_derivative
from diffusion_jax.types import PerExample

Score = Callable[[jax.Array, jax.Array], jax.Array]
"""(x [b ...], t [] or [b]) -> grad_x ln p_t(x) [b ...]."""

Drift = Callable[[jax.Array, jax.Array], jax.Array]


class SDE(NamedTuple):
  """drift(x [b ...], t) -> [b ...] and diffusion(t) -> g, of t's shape."""

  drift: Drift
  diffusion: Callable[[jax.Array], jax.Array]


def diffusion_squared(process: Process, t: jax.Array) -> jax.Array:
  """g^2(t) = 2 sigma (d sigma / dt - sigma d ln alpha / dt), of t's shape."""
  (_, sigma), (_, sigma_rate) = time_derivative(process, t)
  return 2 * sigma * (sigma_rate - drift_rate(process, t) * sigma)


def forward(process: Process) -> SDE:
  """The SDE whose solution given x_0 is N(alpha_t x_0, sigma_t^2).

  VP, sub-VP and VE of Song et al. 2021 (eq. 25, 27 and 22) are those of `processes.linear`,
  `processes.sub_vp` and `processes.exponential`.
  """

  def diffusion(t):
    # A square root of 0 has an infinite gradient; the floor gives 0.
    return jnp.sqrt(jnp.maximum(diffusion_squared(process, t), 1e-30))

  return SDE(lambda x, t: expand(drift_rate(process, t), x) * x, diffusion)


def reverse(sde: SDE, score: Score, noise: float = 1.0) -> SDE:
  """The SDE that, run from t = 1 to 0, has the forward one's marginals.

  dx = [f - (1 + noise^2) / 2 g^2 score] dt + noise g dw (Zhang & Chen 2023, section 2). noise = 1
  is Anderson's reverse SDE (Song et al. 2021, eq. 6), noise = 0 the probability-flow ODE.
  """
  share = (1 + noise**2) / 2

  def drift(x, t):
    return sde.drift(x, t) - share * expand(sde.diffusion(t) ** 2, x) * score(x, t)

  return SDE(drift, lambda t: noise * sde.diffusion(t))


def probability_flow(sde: SDE, score: Score) -> Drift:
  """dx/dt = f - 1/2 g^2 score, the ODE with the SDE's marginals (Song et al. 2021, eq. 7)."""
  return reverse(sde, score, noise=0.0).drift


def score_function(process: Process, denoise: Denoiser) -> Score:
  """Tweedie: score = (alpha E[x_0 | x] - x) / sigma^2 (Efron 2011)."""

  def score(x, t):
    alpha, sigma = process(t)
    x0 = denoise(x, alpha, sigma)
    return divide(expand(alpha, x) * x0 - x, expand(sigma, x) ** 2)

  return score


def velocity(process: Process, denoise: Denoiser) -> Drift:
  """dx/dt = alpha' x_0 + sigma' eps with estimates for both (Lipman et al. 2023, eq. 23).

  The same ODE as `probability_flow`, without the drift's division by alpha: finite at alpha = 0.
  """

  def drift(x, t):
    (alpha, sigma), rates = time_derivative(process, t)
    x0 = denoise(x, alpha, sigma)
    eps = divide(x - expand(alpha, x) * x0, expand(sigma, x))
    return expand(rates[0], x) * x0 + expand(rates[1], x) * eps

  return drift


def marginal(process: Process, x0: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean [b ...], standard deviation, of t's shape) of p(x_t | x_0)."""
  alpha, sigma = process(t)
  return expand(alpha, x0) * x0, sigma


def prior_std(process: Process, dtype=float) -> jax.Array:
  """Deviation [] of the Gaussian that sampling starts from: sqrt(alpha(1)^2 + sigma(1)^2).

  That of x_1 for data of unit variance, and so exactly 1 for every VP process, as in Song et al.
  2021; sigma(1) alone would leave out what signal is left there.
  """
  return jnp.hypot(*process(jnp.ones((), dtype)))


def prior_log_density(process: Process, x: jax.Array) -> PerExample:
  """ln N(x; 0, prior_std^2), summed over all but the first axis, nats."""
  std = prior_std(process, x.dtype)
  log_density = -((x / std) ** 2) / 2 - jnp.log(std) - jnp.log(2 * jnp.pi) / 2
  return log_density.reshape(len(x), -1).sum(1)
