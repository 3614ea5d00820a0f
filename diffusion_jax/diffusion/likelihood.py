"""Likelihood by the probability-flow ODE, in bits per dimension, one value per example.

`bounds` are cheaper. Both need a denoiser D(x, alpha, sigma) and a process t -> (alpha, sigma), t
in [0, 1]; keys [b], one per example, make values independent of the batch. The density is of x's
own space: for latents, of latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import registry
from diffusion_jax.diffusion.bounds import bits_per_dim, gaussian_log_density, stratified_times
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.losses import total
from diffusion_jax.diffusion.parameterization import divide, expand
from diffusion_jax.diffusion.processes import Process, time_derivative
from diffusion_jax.diffusion.samplers.common import unit_noise
from diffusion_jax.types import Latents, PerExample

Field = Callable[[Latents], Latents]

TRACES = ('exact', 'rademacher', 'gaussian')
# Explicit Runge-Kutta methods: what each stage takes of the slopes before it, then the weights.
TABLEAUX = {
  'heun': (((0, 0), (1, 0)), (1 / 2, 1 / 2)),
  'rk4': (
    ((0, 0, 0, 0), (1 / 2, 0, 0, 0), (0, 1 / 2, 0, 0), (0, 0, 1, 0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
  ),
}
SOLVERS = ('adaptive', *TABLEAUX)


class FlowLikelihood(NamedTuple):
  """bits [b] per dimension; latents [b ...], what x is mapped to at t = 1; steps [] taken."""

  bits: PerExample
  latents: Latents
  steps: jax.Array


def velocity(process: Process, denoise: Denoiser) -> Callable[[Latents, jax.Array], Latents]:
  """dx/dt = alpha' x_0 + sigma' eps with estimates for both (Lipman et al. 2023, eq. 23).

  The probability-flow ODE (Song et al. 2021, eq. 7), finite at alpha = 0.
  """

  def drift(x, t):
    (alpha, sigma), rates = time_derivative(process, t)
    x0 = denoise(x, alpha, sigma)
    eps = divide(x - expand(alpha, x) * x0, expand(sigma, x))
    return expand(rates[0], x) * x0 + expand(rates[1], x) * eps

  return drift


def exact_divergence(field: Field, x: Latents) -> tuple[Latents, PerExample]:
  """(field at x [b ...], trace of its Jacobian [b]): one backward pass per dimension."""
  value, pull = jax.vjp(field, x)
  size = x[0].size

  def entry(i):
    unit = jnp.zeros(size, x.dtype).at[i].set(1).reshape(x.shape[1:])
    return total(unit * pull(jnp.broadcast_to(unit, x.shape))[0])

  return value, jax.lax.map(entry, jnp.arange(size)).sum(axis=0)


def hutchinson_divergence(
  field: Field, x: Latents, probes: jax.Array
) -> tuple[Latents, PerExample]:
  """(field at x [b ...], mean of e^T J e over probes e [p b ...]): one backward pass each.

  Unbiased for probes of mean 0 and unit covariance (Grathwohl et al. 2019, eq. 7). Attention
  kernels often have no forward-mode derivative.
  """
  value, pull = jax.vjp(field, x)
  traces = jax.vmap(lambda e: total(e * pull(e)[0]))(probes)
  return value, traces.mean(axis=0)


def flow_likelihood(
  denoise: Denoiser, x: Latents, process: Process, keys: jax.Array, *, trace: str = 'rademacher',
  probes: int = 1, solver: str = 'adaptive', steps: int = 64, rtol: float = 1e-5,
  atol: float = 1e-5, max_steps: int = 4096, t_min: float = 1e-5, start_noise: bool = False,
  prior_std: float | None = None,
) -> FlowLikelihood:
  """-log2 p(x) per dimension by the instantaneous change of variables (Song et al. 2021, eq. 39).

  log p(x) = log N(x_1; 0, prior_std^2) + integral over [t_min, 1] of the velocity's divergence.

  Args:
    x: [b ...]; it is read as x_t / alpha_t at t_min, whose density is the data's blurred by
      sigma / alpha there.
    trace: 'exact', or Hutchinson's estimate with 'rademacher' or 'gaussian' noise, the mean of
      `probes`, fixed for each example so that the ODE stays deterministic.
    solver: 'adaptive' (Tsitouras' 5(4), one step size for the batch) with rtol and atol on x and
      on nats per dimension, or 'rk4' or 'heun' with `steps` steps, even in log(1e-4 + SNR).
    max_steps: of the adaptive solver; where they do not suffice, bits are NaN.
    t_min: where data begins; sigma must be above 0 there.
    prior_std: of the Gaussian at t = 1; default sqrt(alpha(1)^2 + sigma(1)^2), 1 for VP.
    start_noise: start from alpha x + sigma eps, which is what the network knows, rather than from
      alpha x; the expectation is then an upper bound (Zheng et al. 2023).
  """
  registry.check(TRACES, trace, 'trace')
  registry.check(SOLVERS, solver, 'solver')
  alpha, sigma = process(jnp.asarray(t_min, x.dtype))
  start = alpha * x + (sigma * unit_noise(keys, 0, x) if start_noise else 0)
  derivative = _derivative(velocity(process, denoise), trace, probes, keys, x)
  state = (start, jnp.zeros(len(x), x.dtype))
  if solver == 'adaptive':
    (end, gained), taken = _adaptive(derivative, state, t_min, rtol, atol, max_steps)
  else:
    times = stratified_times(process, jnp.linspace(0, 1, steps + 1, dtype=x.dtype), t_min, 1e-4)
    (end, gained), taken = _fixed(derivative, state, times, *TABLEAUX[solver]), jnp.array(steps)
  if prior_std is None:  # Of x_1 for data of unit variance, 1 for VP.
    prior_std = jnp.hypot(*process(jnp.ones((), x.dtype)))
  nats = -total(gaussian_log_density(end, 0.0, 2 * jnp.log(prior_std)))
  # gained is nats per dimension; the density of x_t / alpha_t is alpha_t^d times that of x_t.
  nats = nats - (gained + jnp.log(alpha)) * x[0].size
  return FlowLikelihood(bits_per_dim(nats, x), end, taken)


def _derivative(drift, trace: str, probes: int, keys, x):
  """(t, (x, gained)) -> its time derivative; gained is the divergence's integral per dimension."""
  if trace != 'exact':
    distribution = {'rademacher': jax.random.rademacher, 'gaussian': jax.random.normal}[trace]
    noise = jnp.stack([unit_noise(keys, 1 + i, x, distribution) for i in range(probes)])

  def derivative(t, state):
    at_t = lambda x: drift(x, t)
    if trace == 'exact':
      value, divergence = exact_divergence(at_t, state[0])
    else:
      value, divergence = hutchinson_divergence(at_t, state[0], noise)
    return value, divergence / x[0].size

  return derivative


def _adaptive(derivative, state, t_min, rtol, atol, max_steps):
  """State at t = 1, NaN where the solver gave up, and the number of steps, rejected ones too."""
  with jax.ensure_compile_time_eval():  # Imported within a trace, its constants would be tracers.
    import diffrax  # Takes long, and only likelihoods need it.

  t_min, end = jnp.asarray(t_min, state[0].dtype), jnp.ones((), state[0].dtype)
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, state, _: derivative(t, state)), diffrax.Tsit5(), t_min, end, None,
    state, stepsize_controller=diffrax.PIDController(rtol, atol), max_steps=max_steps, throw=False,
  )
  good = solution.result == diffrax.RESULTS.successful
  last = jax.tree.map(lambda part: jnp.where(good, part[-1], jnp.nan), solution.ys)
  return last, solution.stats['num_steps']


def _fixed(derivative, state, times, rows, weights):
  """State at the last of times [n+1] by an explicit Runge-Kutta method."""
  rows, weights = jnp.asarray(rows, times.dtype), jnp.asarray(weights, times.dtype)

  def move(state, h, slopes, factors):
    add = lambda value, slopes: value + h * jnp.tensordot(factors, slopes, axes=1)
    return jax.tree.map(add, state, slopes)

  def step(state, ends):
    start, h = ends[0], ends[1] - ends[0]

    def stage(slopes, item):
      index, row = item
      slope = derivative(start + row.sum() * h, move(state, h, slopes, row))
      return jax.tree.map(lambda all, one: all.at[index].set(one), slopes, slope), None

    # A scan over stages, so that the network is compiled once.
    slopes = jax.tree.map(lambda part: jnp.zeros((len(rows), *part.shape), part.dtype), state)
    slopes, _ = jax.lax.scan(stage, slopes, (jnp.arange(len(rows)), rows))
    return move(state, h, slopes, weights), None

  return jax.lax.scan(step, state, (times[:-1], times[1:]))[0]
