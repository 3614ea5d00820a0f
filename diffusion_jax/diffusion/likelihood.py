"""Likelihood by the probability-flow ODE, in bits per dimension, one value per example.

The other way, `bounds`, is cheaper and a bound. Both need only a denoiser D(x, alpha, sigma) and a
process t -> (alpha, sigma), t in [0, 1]; keys [b], one per example, make a value independent of the
batch that it was computed in. A density is that of the space x lives in: for latents, of latents.
Images of integers get a probability by dequantisation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.losses import total
from diffusion_jax.diffusion.processes import Process
from diffusion_jax.diffusion.variational import bits_per_dim, gaussian_log_density
from diffusion_jax.errors import UserError
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


def unit_noise(keys: jax.Array, index, like: jax.Array, draw=jax.random.normal) -> jax.Array:
  """The index-th noise [b ...] of each key of keys [b]."""
  one = lambda key: draw(jax.random.fold_in(key, index), like.shape[1:], like.dtype)
  return jax.vmap(one)(keys)


def stratified_times(process: Process, fractions: jax.Array, t_min: float, floor: float):
  """Times [n] that divide the range of log(floor + SNR) over [t_min, 1] at fractions [n].

  Found by bisection, as the SNR falls with t. At a floor above 0 the range is finite for processes
  that end in pure noise; a large floor puts most times where there is much signal.
  """
  def value(t):
    alpha, sigma = process(t)
    return jnp.log(alpha**2 + floor * sigma**2) - 2 * jnp.log(sigma)

  low, high = jnp.asarray(t_min, fractions.dtype), jnp.ones((), fractions.dtype)
  wanted = value(low) + fractions * (value(high) - value(low))

  def halve(_, ends):
    low, high = ends
    # Between times of different magnitude the geometric mean is the better middle.
    middle = jnp.where(low > 0, jnp.sqrt(low * high), high / 2)
    middle = jnp.where(high > 2 * low, middle, (low + high) / 2)
    early = value(middle) > wanted
    return jnp.where(early, middle, low), jnp.where(early, high, middle)

  ends = jnp.broadcast_to(low, fractions.shape), jnp.broadcast_to(high, fractions.shape)
  low, high = jax.lax.fori_loop(0, 80, halve, ends)
  times = jnp.where(fractions <= 0, t_min, (low + high) / 2)
  return jnp.where(fractions >= 1, 1.0, times)


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

  Unbiased for probes of mean 0 and unit covariance (Grathwohl et al. 2019, eq. 7). Backward passes,
  as attention kernels often lack forward ones.
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
    trace: 'exact', or Hutchinson's estimate with 'rademacher' or 'gaussian' noise, drawn once per
      example so that the ODE stays deterministic.
    probes: how many of them are averaged.
    solver: 'adaptive' (Tsitouras' 5(4), one step size for the batch) with rtol and atol on x and
      on nats per dimension, or 'rk4' or 'heun' with `steps` steps, even in log(1e-4 + SNR).
    max_steps: of the adaptive solver; where they do not suffice, bits are NaN.
    t_min: where data begins; sigma must be above 0 there.
    start_noise: start from alpha x + sigma eps, which is what the network knows, rather than from
      alpha x; the expectation is then an upper bound (Zheng et al. 2023).
    prior_std: of the Gaussian at t = 1; default `processes.prior_std`, which is 1 for VP.

  Raises:
    UserError: for an unknown trace or solver.
  """
  if trace not in TRACES:
    raise UserError(f'trace {trace!r} is unknown; choose one of {", ".join(TRACES)}.')
  if solver not in SOLVERS:
    raise UserError(f'solver {solver!r} is unknown; choose one of {", ".join(SOLVERS)}.')
  alpha, sigma = process(jnp.asarray(t_min, x.dtype))
  start = alpha * x + (sigma * unit_noise(keys, 0, x) if start_noise else 0)
  derivative = _derivative(processes.velocity(process, denoise), trace, probes, keys, x)
  state = (start, jnp.zeros(len(x), x.dtype))
  if solver == 'adaptive':
    (end, gained), taken = _adaptive(derivative, state, t_min, rtol, atol, max_steps)
  else:
    times = stratified_times(process, jnp.linspace(0, 1, steps + 1, dtype=x.dtype), t_min, 1e-4)
    (end, gained), taken = _fixed(derivative, state, times, *TABLEAUX[solver]), jnp.array(steps)
  prior_std = processes.prior_std(process, x.dtype) if prior_std is None else prior_std
  nats = -total(gaussian_log_density(end, 0.0, 2 * jnp.log(prior_std)))
  # gained is nats per dimension; the density of x_t / alpha_t is alpha_t^d times that of x_t.
  nats = nats - (gained + jnp.log(alpha)) * x[0].size
  return FlowLikelihood(bits_per_dim(nats, x), end, taken)


def _derivative(drift, trace: str, probes: int, keys, x):
  """(t, (x, gained)) -> its time derivative; gained is the divergence's integral per dimension."""
  if trace != 'exact':
    draw = {'rademacher': jax.random.rademacher, 'gaussian': jax.random.normal}[trace]
    noise = jnp.stack([unit_noise(keys, 1 + i, x, draw) for i in range(probes)])

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
