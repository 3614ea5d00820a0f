"""Noising processes in continuous time: t in [0, 1] -> (alpha_t, sigma_t), growing towards noise.

x_t = alpha_t x_0 + sigma_t eps. A process is a plain function on arrays of any shape; whatever else
a method needs (log-SNR, drift, diffusion, velocity) is derived from it by `jax.jvp`. Tables of T
steps are processes sampled at T times (`schedules.Schedule`). Differences that cancel near t = 0
are written so that sigma keeps its relative precision in float32.

Stochastic differential equations dx = f(x, t) dt + g(t) dw, all derived from a process.

A process t -> (alpha, sigma) has the forward SDE with f = (d ln alpha / dt) x and
g^2 = d sigma^2 / dt - 2 (d ln alpha / dt) sigma^2 (Lu et al. 2022, section 2.1). The reverse SDE
and the probability-flow ODE follow from that SDE and the score. x is [b ...] and t is [] or [b]; a
score is `score(x, t) -> grad_x ln p_t(x)`, of x's shape.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.errors import UserError
from diffusion_jax.types import PerExample

Process = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""t [...] in [0, 1] -> (alpha [...], sigma [...])."""

Rate = Callable[[jax.Array], jax.Array]
"""t [...] in [0, 1] -> beta(t) [...], noise added per unit of time."""

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def _real(t) -> jax.Array:
  """t as an array of floats."""
  t = jnp.asarray(t)
  return t if jnp.issubdtype(t.dtype, jnp.inexact) else t.astype(float)


def _root(x: jax.Array) -> jax.Array:
  """sqrt(max(x, 0)) whose gradient at 0 is 0 rather than infinite."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def tabulate(process: Process, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(alphas [n], sigmas [n]) of a process at times [n], float64 whatever JAX's default."""
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    alphas, sigmas = process(jnp.asarray(times, jnp.float64))
    return np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64)


def linear_rate(start: float, end: float) -> Rate:
  """beta linear in t (Ho et al. 2020, section 4; Song et al. 2021, eq. 32)."""
  return lambda t: start + t * (end - start)


def scaled_linear_rate(start: float, end: float) -> Rate:
  """sqrt(beta) linear in t (Rombach et al. 2022)."""
  return lambda t: (start**0.5 + t * (end**0.5 - start**0.5)) ** 2


def sigmoid_rate(start: float, end: float) -> Rate:
  """beta follows a logistic curve over [-6, 6] (Xu et al. 2022, GeoDiff)."""

  def rate(t):
    exp = np.exp if isinstance(t, np.ndarray) else jnp.exp
    return start + (end - start) / (1 + exp(6 - 12 * t))

  return rate


def variance_preserving(rate: Rate) -> Process:
  """alpha = exp(-1/2 int_0^t beta), sigma^2 = 1 - alpha^2 (Song et al. 2021, eq. 29).

  The integral is Gauss-Legendre's with 32 nodes: exact for polynomials, and to 1e-13 for any rate
  as smooth as `sigmoid_rate`.
  """

  def process(t):
    t = _real(t)
    nodes, weights = jnp.asarray((NODES + 1) / 2, t.dtype), jnp.asarray(WEIGHTS / 2, t.dtype)
    integral = t * (weights * rate(t[..., None] * nodes)).sum(-1)
    return jnp.exp(-integral / 2), _root(-jnp.expm1(-integral))

  return process


def linear(start: float = 0.1, end: float = 20.0) -> Process:
  """VP with linear beta(t); Song et al. 2021, eq. 32 and 33. 1000 times DDPM's betas."""
  return variance_preserving(linear_rate(start, end))


def scaled_linear(start: float = 0.85, end: float = 12.0) -> Process:
  """VP with sqrt(beta(t)) linear; 1000 times Stable Diffusion's betas."""
  return variance_preserving(scaled_linear_rate(start, end))


def cosine(offset: float = 0.008) -> Process:
  """alpha = cos(u) / cos(u_0), u = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17).

  sigma^2 = sin(u - u_0) sin(u + u_0) / cos^2(u_0). alpha(1) = 0. With offset 0 this is the
  trigonometric interpolant alpha = cos(pi t / 2), sigma = sin(pi t / 2).
  """
  start = offset / (1 + offset) * math.pi / 2
  rest = math.pi / 2 - start

  def process(t):
    u = _real(t) * rest
    left = rest * (1 - _real(t))  # cos(u + start) without the error of pi / 2 near t = 1
    alpha = jnp.sin(left) / math.cos(start)
    if not offset:
      return alpha, jnp.sin(u)
    return alpha, _root(jnp.sin(u) * jnp.sin(u + 2 * start)) / math.cos(start)

  return process


def arc(first: tuple[float, float], last: tuple[float, float]) -> Process:
  """VP from the pair (alpha, sigma) at t = 0 to that at t = 1: the angle is linear in t.

  Every VP process between the same pairs runs through the same levels, at another pace.
  """
  start, end = (math.atan2(sigma, alpha) for alpha, sigma in (first, last))
  rest = math.atan2(last[0], last[1])  # pi / 2 - end, without its error at alpha = 0

  def process(t):
    t = _real(t)
    return jnp.sin(rest + (1 - t) * (end - start)), jnp.sin(start + t * (end - start))

  return process


def sigmoid(start: float = -3.0, end: float = 3.0, temperature: float = 1.0) -> Process:
  """alpha^2 falls from 1 to 0 along a logistic curve (Jabri et al. 2022; Chen 2023, algorithm 1).

  alpha^2 = (S(e) - S(x)) / (S(e) - S(s)), x = s + t (e - s), S the logistic function of x /
  temperature. Differences of S are products of sinh and cosh, which do not cancel.
  """
  low, high = start / temperature / 2, end / temperature / 2

  def process(t):
    t = _real(t)
    span = high - low
    below = math.sinh(span) * jnp.cosh(low + t * span)
    alpha = _root(jnp.sinh((1 - t) * span) * math.cosh(low) / below)
    return alpha, _root(jnp.sinh(t * span) * math.cosh(high) / below)

  return process


def sub_vp(process: Process) -> Process:
  """The sub-VP process of a VP one: the same alpha, sigma = 1 - alpha^2 (Song et al. 2021, eq. 29).

  Its noise is never more than the VP process's sqrt(1 - alpha^2).
  """

  def sub(t):
    alpha, sigma = process(t)
    return alpha, sigma**2

  return sub


def variance_exploding(sigma: Callable[[jax.Array], jax.Array]) -> Process:
  """alpha = 1 and the given sigma(t)."""

  def process(t):
    value = sigma(_real(t))
    return jnp.ones_like(value), value

  return process


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Process:
  """sigma^(1/rho) linear in t (Karras et al. 2022, eq. 5). rho = 1 is sigma linear in t."""
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  return variance_exploding(lambda t: (low + t * (high - low)) ** rho)


def exponential(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
  """ln sigma linear in t: NCSN's geometric levels, VE (Song et al. 2021, eq. 30)."""
  return polyexponential(sigma_min, sigma_max, 1.0)


def polyexponential(
  sigma_min: float = 0.01, sigma_max: float = 50.0, rho: float = 2.0
) -> Process:
  """ln sigma linear in t^rho (k-diffusion's `get_sigmas_polyexponential`)."""
  ratio = math.log(sigma_max / sigma_min)
  return variance_exploding(lambda t: sigma_min * jnp.exp(ratio * t**rho))


def from_log_snr(log_snr: Callable[[jax.Array], jax.Array]) -> Process:
  """VP with ln(alpha^2 / sigma^2) given: alpha^2 = sigmoid(log_snr) (Kingma et al. 2021, eq. 3)."""

  def process(t):
    value = log_snr(_real(t))
    return jnp.exp(jax.nn.log_sigmoid(value) / 2), jnp.exp(jax.nn.log_sigmoid(-value) / 2)

  return process


def log_linear(gamma_min: float = -13.3, gamma_max: float = 5.0) -> Process:
  """VDM: gamma = -ln SNR linear in t (Kingma et al. 2021; end points of its released code)."""
  return from_log_snr(lambda t: -(gamma_min + t * (gamma_max - gamma_min)))


def flow(shift: float = 1.0) -> Process:
  """Rectified flow: alpha = 1 - s, sigma = s, s = shift t / (1 + (shift - 1) t).

  Liu et al. 2023, eq. 1; shift: Esser et al. 2024, eq. 23. It multiplies sigma / alpha by `shift`.
  """

  def process(t):
    t = _real(t)
    below = 1 + (shift - 1) * t
    return (1 - t) / below, shift * t / below

  return process


def resolution_shift(size: float, base: float) -> float:
  """`shift` for images of `size` pixels a side, where `base` needs none: sqrt(m / n) = size / base.

  Esser et al. 2024, section 5.3.2; Hoogeboom et al. 2023, section 2.1.
  """
  return size / base


def shifted(process: Process, shift: float) -> Process:
  """sigma / alpha times `shift` at equal alpha^2 + sigma^2 (Hoogeboom et al. 2023, section 2.1).

  The log-SNR falls by 2 ln shift. For a flow use `flow(shift)`, which keeps alpha + sigma.
  """
  return lambda t: shift_pair(*process(t), shift)


def shift_pair(alpha, sigma, shift: float):
  """What `shifted` does to one pair."""
  scale = ((alpha**2 + sigma**2) / (alpha**2 + (shift * sigma) ** 2)) ** 0.5
  return scale * alpha, scale * shift * sigma


def zero_terminal(process: Process) -> Process:
  """Shifts and scales alpha of a VP process so that alpha(1) = 0 (Lin et al. 2024, algorithm 1).

  alpha' = (alpha - A) / (1 - A), A = alpha(1). sigma'^2 = (1 - alpha') (1 + alpha') with
  1 - alpha' = sigma^2 / ((1 + alpha) (1 - A)).
  """

  def rescaled(t):
    t = _real(t)
    alpha, sigma = process(t)
    last = process(jnp.ones((), t.dtype))[0]
    new = (alpha - last) / (1 - last)
    return new, sigma * jnp.sqrt((1 + new) / ((1 + alpha) * (1 - last)))

  return rescaled


def log_snr(process: Process, t: jax.Array) -> jax.Array:
  """ln(alpha^2 / sigma^2), +-inf where sigma or alpha is 0."""
  alpha, sigma = process(t)
  return 2 * (jnp.log(alpha) - jnp.log(sigma))


def time_derivative(
  process: Process, t: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """((alpha, sigma), (d alpha / dt, d sigma / dt)), each of t's shape.

  Taken just inside (0, 1), where both ends of every process here have finite derivatives: sigma of
  a VP process starts like sqrt(t), and the drift of one that ends at alpha = 0 is infinite there.
  """
  t = _real(t)
  t = jnp.clip(t, 1e-30, 1 - jnp.finfo(t.dtype).eps)
  return jax.jvp(process, (t,), (jnp.ones_like(t),))


def drift_rate(process: Process, t: jax.Array) -> jax.Array:
  """d ln alpha / dt, at most 1 / eps of the dtype where alpha reaches 0 at t = 1."""
  (alpha, _), (alpha_rate, _) = time_derivative(process, t)
  return alpha_rate / jnp.maximum(alpha, jnp.finfo(alpha.dtype).eps * jnp.abs(alpha_rate))


def log_snr_rate(process: Process, t: jax.Array) -> jax.Array:
  """d log-SNR / dt, negative."""
  (_, sigma), (_, sigma_rate) = time_derivative(process, t)
  return 2 * (drift_rate(process, t) - sigma_rate / sigma)


PROCESSES: dict[str, Callable[..., Process]] = {
  'linear': linear,
  'scaled_linear': scaled_linear,
  'cosine': cosine,
  'sigmoid': sigmoid,
  'karras': karras,
  'exponential': exponential,
  'polyexponential': polyexponential,
  'log_linear': log_linear,
  'flow': flow,
}


def named(name: str, **options) -> Process:
  """The process of that name; options are its constructor's, such as sigma_max=80.

  Raises:
    UserError: for a name that is not in the table, or an option that the process does not have.
  """
  if name not in PROCESSES:
    raise UserError(f'process {name!r} is unknown; choose one of {", ".join(PROCESSES)}.')
  known = inspect.signature(PROCESSES[name]).parameters
  for option in options:
    if option not in known:
      raise UserError(
        f'process {name!r} has no option {option!r}; choose from {", ".join(known)}.'
      )
  return PROCESSES[name](**options)


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
