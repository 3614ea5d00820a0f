"""Noising processes in continuous time: t in [0, 1] -> (alpha_t, sigma_t), growing towards noise.

x_t = alpha_t x_0 + sigma_t eps. A process is a plain function on arrays of any shape; whatever else
a method needs (log-SNR, drift, velocity) is derived from it by `jax.jvp`. Tables of T steps are
processes sampled at T times (`noise.Schedule`). Differences that cancel near t = 0 are written so
that sigma keeps its relative precision in float32.
"""

import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import registry
from diffusion_jax.errors import UserError
from diffusion_jax.types import Params

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
  """Return (alphas [n], sigmas [n]) of a process at times [n], float64 whatever JAX's default."""
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    alphas, sigmas = process(jnp.asarray(times, jnp.float64))
    return np.asarray(alphas, np.float64), np.asarray(sigmas, np.float64)


def constructor(pair: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Process]:
  """Make a function of options that returns a process, of pair(t, options) -> (alpha, sigma)."""

  @functools.wraps(pair)
  def make(*options, **more) -> Process:
    return lambda t: pair(_real(t), *options, **more)

  return make


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


@constructor
def variance_preserving(t, rate: Rate):
  """alpha = exp(-1/2 int_0^t beta), sigma^2 = 1 - alpha^2 (Song et al. 2021, eq. 29).

  The integral is Gauss-Legendre's with 32 nodes: to 1e-13 for rates as smooth as `sigmoid_rate`.
  """
  nodes, weights = jnp.asarray((NODES + 1) / 2, t.dtype), jnp.asarray(WEIGHTS / 2, t.dtype)
  integral = t * (weights * rate(t[..., None] * nodes)).sum(-1)
  return jnp.exp(-integral / 2), _root(-jnp.expm1(-integral))


def linear(start: float = 0.1, end: float = 20.0) -> Process:
  """VP with linear beta(t); Song et al. 2021, eq. 32 and 33. 1000 times DDPM's betas."""
  return variance_preserving(linear_rate(start, end))


def scaled_linear(start: float = 0.85, end: float = 12.0) -> Process:
  """VP with sqrt(beta(t)) linear; 1000 times Stable Diffusion's betas."""
  return variance_preserving(scaled_linear_rate(start, end))


@constructor
def cosine(t, offset: float = 0.008):
  """alpha = cos(u) / cos(u_0), u = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17).

  sigma^2 = sin(u - u_0) sin(u + u_0) / cos^2(u_0). alpha(1) = 0. With offset 0 this is the
  trigonometric interpolant alpha = cos(pi t / 2), sigma = sin(pi t / 2).
  """
  start = offset / (1 + offset) * math.pi / 2
  rest = math.pi / 2 - start
  u, left = t * rest, rest * (1 - t)  # cos(u + start) without the error of pi / 2 near t = 1
  alpha = jnp.sin(left) / math.cos(start)
  if not offset:
    return alpha, jnp.sin(u)
  return alpha, _root(jnp.sin(u) * jnp.sin(u + 2 * start)) / math.cos(start)


@constructor
def arc(t, first: tuple[float, float], last: tuple[float, float]):
  """VP from the pair (alpha, sigma) at t = 0 to that at t = 1: the angle is linear in t.

  Every VP process between these pairs has the same levels, at another pace.
  """
  start, end = (math.atan2(sigma, alpha) for alpha, sigma in (first, last))
  rest = math.atan2(last[0], last[1])  # pi / 2 - end, without its error at alpha = 0
  return jnp.sin(rest + (1 - t) * (end - start)), jnp.sin(start + t * (end - start))


@constructor
def sigmoid(t, start: float = -3.0, end: float = 3.0, temperature: float = 1.0):
  """alpha^2 falls from 1 to 0 along a logistic curve (Jabri et al. 2022; Chen 2023, algorithm 1).

  alpha^2 = (S(e) - S(x)) / (S(e) - S(s)), x = s + t (e - s), S the logistic function of x /
  temperature. Differences of S are products of sinh and cosh, which do not cancel.
  """
  low, high = start / temperature / 2, end / temperature / 2
  span = high - low
  below = math.sinh(span) * jnp.cosh(low + t * span)
  alpha = _root(jnp.sinh((1 - t) * span) * math.cosh(low) / below)
  return alpha, _root(jnp.sinh(t * span) * math.cosh(high) / below)


@constructor
def sub_vp(t, process: Process):
  """alpha of a VP process, sigma = 1 - alpha^2, which is less (Song et al. 2021, eq. 29)."""
  alpha, sigma = process(t)
  return alpha, sigma**2


@constructor
def karras(t, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
  """VE, alpha = 1: sigma^(1/rho) linear in t (Karras et al. 2022, eq. 5)."""
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  sigma = (low + t * (high - low)) ** rho
  return jnp.ones_like(sigma), sigma


@constructor
def polyexponential(t, sigma_min: float = 0.01, sigma_max: float = 50.0, rho: float = 2.0):
  """VE, alpha = 1: ln sigma linear in t^rho (k-diffusion's `get_sigmas_polyexponential`)."""
  sigma = sigma_min * jnp.exp(math.log(sigma_max / sigma_min) * t**rho)
  return jnp.ones_like(sigma), sigma


def exponential(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
  """VE, alpha = 1: ln sigma linear in t, NCSN's geometric levels (Song et al. 2021, eq. 30)."""
  return polyexponential(sigma_min, sigma_max, 1.0)


@constructor
def from_log_snr(t, log_snr: Callable[[jax.Array], jax.Array]):
  """VP with ln(alpha^2 / sigma^2) given: alpha^2 = sigmoid(log_snr) (Kingma et al. 2021, eq. 3)."""
  value = log_snr(t)
  return jnp.exp(jax.nn.log_sigmoid(value) / 2), jnp.exp(jax.nn.log_sigmoid(-value) / 2)


def log_linear(gamma_min: float = -13.3, gamma_max: float = 5.0) -> Process:
  """VDM: gamma = -ln SNR linear in t (Kingma et al. 2021; end points of its released code)."""
  return from_log_snr(lambda t: -(gamma_min + t * (gamma_max - gamma_min)))


@constructor
def flow(t, shift: float = 1.0):
  """Rectified flow: alpha = 1 - s, sigma = s, s = shift t / (1 + (shift - 1) t).

  Liu et al. 2023, eq. 1; `shift` multiplies sigma / alpha (Esser et al. 2024, eq. 23).
  """
  below = 1 + (shift - 1) * t
  return (1 - t) / below, shift * t / below


def shifted(process: Process, shift: float) -> Process:
  """sigma / alpha times `shift` at equal alpha^2 + sigma^2 (Hoogeboom et al. 2023, section 2.1).

  The log-SNR falls by 2 ln shift. For a flow use `flow(shift)`, which keeps alpha + sigma.
  """
  return lambda t: shift_pair(*process(t), shift)


def shift_pair(alpha, sigma, shift: float):
  """Return one pair as `shifted` changes it."""
  scale = ((alpha**2 + sigma**2) / (alpha**2 + (shift * sigma) ** 2)) ** 0.5
  return scale * alpha, scale * shift * sigma


@constructor
def zero_terminal(t, process: Process):
  """Shift and scale alpha of a VP process so that alpha(1) = 0 (Lin et al. 2024, algorithm 1).

  alpha' = (alpha - A) / (1 - A), A = alpha(1). sigma'^2 = (1 - alpha') (1 + alpha') with
  1 - alpha' = sigma^2 / ((1 + alpha) (1 - A)).
  """
  alpha, sigma = process(t)
  last = process(jnp.ones((), t.dtype))[0]
  new = (alpha - last) / (1 - last)
  return new, sigma * jnp.sqrt((1 + new) / ((1 + alpha) * (1 - last)))


def log_snr(process: Process, t: jax.Array) -> jax.Array:
  """ln(alpha^2 / sigma^2), +-inf where sigma or alpha is 0."""
  alpha, sigma = process(t)
  return 2 * (jnp.log(alpha) - jnp.log(sigma))


def time_derivative(process: Process, t: jax.Array):
  """((alpha, sigma), (d alpha / dt, d sigma / dt)), each of t's shape.

  Taken just inside (0, 1), where derivatives are finite: sigma of a VP process starts like sqrt(t),
  and the drift towards alpha = 0 is infinite.
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
  'linear': linear, 'scaled_linear': scaled_linear, 'cosine': cosine, 'sigmoid': sigmoid,
  'karras': karras, 'exponential': exponential, 'polyexponential': polyexponential,
  'log_linear': log_linear, 'flow': flow,
}


def named(name: str, **options) -> Process:
  """Return a process of the table with its options. UserError for one that is not known."""
  registry.check(PROCESSES, name, 'process')
  known = [option for option in inspect.signature(PROCESSES[name]).parameters if option != 't']
  for option in options:
    if option not in known:
      raise UserError(f'process {name!r} has no option {option!r}; choose from {", ".join(known)}.')
  return PROCESSES[name](**options)


def init_monotone(key: jax.Array, width: int = 1024) -> Params:
  """Parameters of `monotone`: dense layers 1 -> 1, 1 -> width, width -> 1."""
  inner, outer = jax.random.split(key)
  return {
    'l1.kernel': jnp.ones(()), 'l1.bias': jnp.zeros(()),
    'l2.kernel': jax.random.normal(inner, (width,)), 'l2.bias': jnp.zeros((width,)),
    'l3.kernel': jax.random.normal(outer, (width,)) / width**0.5,
  }


def monotone(params: Params, t: jax.Array) -> jax.Array:
  """l1(t) + l3(sigmoid(l2(l1(t)))), kernels made absolute (Kingma et al. 2021, appendix H).

  Grows with t for any parameters; a constant of l3 would cancel in `learned`.
  """
  first = jnp.abs(params['l1.kernel']) * t + params['l1.bias']
  hidden = jax.nn.sigmoid(first[..., None] * jnp.abs(params['l2.kernel']) + params['l2.bias'])
  return first + hidden @ jnp.abs(params['l3.kernel'])


def learned(params: Params, gamma_min: jax.Array, gamma_max: jax.Array) -> Process:
  """VDM with a learned gamma: `monotone` scaled to [gamma_min, gamma_max], which may be parameters.

  Kingma et al. 2021, appendix H.
  """
  low, high = monotone(params, jnp.zeros(())), monotone(params, jnp.ones(()))

  def log_snr(t):
    return -(gamma_min + (gamma_max - gamma_min) * (monotone(params, t) - low) / (high - low))

  return from_log_snr(log_snr)
