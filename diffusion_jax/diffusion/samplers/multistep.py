"""Multistep samplers: one network call a step; the estimates of earlier steps raise the order.

An Adams method replaces the estimate m (x_0 or eps) over a step by the polynomial through its last
values. Coefficients depend on the grid alone, as corrections to the first order: x' = keep x +
clean x_0 + noise z + sum_j correction_j m_{i-j}, of sum 0, computed before the scan. They are 0
without such a polynomial: no past, alpha = 0, or sigma' = 0. A step from a pair to itself counts as
absent, but that a corrector uses its call.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import registry
from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Noise,
  SamplerInfo,
  Steps,
  combine,
  contraction,
  divide,
  epsilon,
  intervals,
  is_inner,
  log_midpoint,
  move,
  moves,
  real_steps,
  scanned,
  step_count,
  straight,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError

ADAMS_BASHFORTH = np.array(
  [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
   [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)

SLOPES = ('exact', 'midpoint', 'linear')

Kernel = Callable[[jax.Array], jax.Array]


class Table(NamedTuple):
  """Coefficients of n steps: keep, clean and noise [n], correction [n k] of the last k values."""

  keep: jax.Array
  clean: jax.Array
  noise: jax.Array
  correction: jax.Array


def half_log_snr(grid: Grid) -> jax.Array:
  """ln(alpha / sigma) [n+1]; 0 in place of infinities, which no formula may use."""
  alphas, sigmas, *_ = grid
  finite = (alphas > 0) & (sigmas > 0)
  return jnp.where(finite, jnp.log(jnp.where(finite, divide(alphas, sigmas), 1)), 0)


def first_order(grid: Grid, eta=0.0, s_noise: float = 1.0) -> tuple[jax.Array, ...]:
  """Keep, clean and noise [n] of the exponential integrator of the reverse SDE, x_0 held.

  x' = s'/s q^eta x + a' (1 - q^(1 + eta)) x_0 + s' sqrt(1 - q^(2 eta)) z with q = r' / r (Lu et al.
  2022, DPM-Solver++, section 5; Xue et al. 2023, SA-Solver, eta = tau^2). eta: [] or [n]; 0 is the
  ODE (DDIM), 1 the reverse SDE. s_noise: factor on z.
  """
  here, there = intervals(grid)
  slower = contraction(here, there) ** jnp.asarray(eta, grid[0].dtype)
  keep = divide(there[1], here[1]) * slower
  deviation = there[1] * jnp.sqrt((1 - slower) * (1 + slower))
  return keep, there[0] - keep * here[0], s_noise * deviation


def step_orders(
  grid: Grid, order: int, *, to_clean: bool = False, lower_order_final: bool | int = False,
  euler_at_final: bool = False,
) -> jax.Array:
  """The number of values [n] that each step may interpolate, its own included, at most `order`.

  to_clean: also for a step to sigma = 0. lower_order_final: no more values than steps left; a
  number: on shorter grids alone. euler_at_final: no interpolation in the last step.
  """
  here, there = intervals(grid)
  index, steps = jnp.arange(len(here[0])), step_count(grid)
  inner = here[0] > 0 if to_clean else is_inner(here, there)
  moving = moves(here, there)
  past = jnp.cumsum(moving & (here[0] > 0))
  counts = jnp.where(inner & moving, jnp.clip(past, 1, order), 1)
  if lower_order_final:
    fewer = jnp.minimum(counts, jnp.maximum(steps - index, 1))
    always = lower_order_final is True
    counts = fewer if always else jnp.where(steps < lower_order_final, fewer, counts)
  return jnp.where(index == steps - 1, 1, counts) if euler_at_final else counts


def past_nodes(grid: Grid, values: jax.Array, counts: jax.Array, order: int) -> jax.Array:
  """Nodes [n order]: for j < counts[i] the value at the start of the j-th last moving step.

  Others are made up, and distinct. values: [n+1], of the grid's pairs; counts: [n].
  """
  done = jnp.cumsum(moves(*intervals(grid)))
  j = jnp.arange(order)
  starts = jnp.searchsorted(done, jnp.maximum(done[:, None] - j, 1))
  own = values[: len(counts), None]
  real = jnp.where(j == 0, own, values[starts])
  return jnp.where(j < counts[:, None], real, own - j * (1 + jnp.abs(own)))


def lagrange(nodes: jax.Array, points: jax.Array) -> jax.Array:
  """Values [n k q] at points [n q] of the k Lagrange polynomials of nodes [n k]."""
  own = jnp.eye(nodes.shape[1], dtype=bool)
  gaps = jnp.where(own, 1, nodes[:, :, None] - nodes[:, None, :])
  offsets = jnp.where(own[..., None], 1, points[:, None, None, :] - nodes[:, None, :, None])
  return jnp.prod(offsets / gaps[..., None], axis=2)


def integrals(nodes: jax.Array, start: jax.Array, end: jax.Array, kernel: Kernel) -> jax.Array:
  """int_start^end kernel(u) l_j(u) du [n k], start and end [n], kernel: u [n q] -> [n q].

  16 points of Gauss-Legendre: to 1e-13 for polynomials, and exp over steps of up to 20.
  """
  half = (end - start)[:, None] / 2
  points = (start + end)[:, None] / 2 + half * jnp.asarray(NODES, nodes.dtype)
  weights = half * jnp.asarray(WEIGHTS, nodes.dtype) * kernel(points)
  return (weights[:, None, :] * lagrange(nodes, points)).sum(-1)


def by_count(counts: jax.Array, order: int, weigh: Callable[[int], jax.Array]) -> jax.Array:
  """Rows of weigh(count) [n count] for each step's own count, padded with zeros to [n order]."""
  tables = [weigh(count) for count in range(1, order + 1)]
  padded = jnp.stack([jnp.pad(t, ((0, 0), (0, order - t.shape[1]))) for t in tables])
  return padded[counts - 1, jnp.arange(len(counts))]


def exponential(
  grid: Grid, nodes: jax.Array, counts: jax.Array, eta=0.0, *,
  slope: str = 'exact', curvature: float = 1.0,
) -> jax.Array:
  """Corrections [n k] to `first_order` for the polynomial through x_0's values at `nodes`.

  The exact weights are a' (1 + eta) int exp((1 + eta) (u - lambda')) l_j(u) du over the step, with
  lambda = ln(alpha / sigma) (Lu et al. 2022, DPM-Solver++, section 4; Xue et al. 2023).

  Args:
    nodes: [n k], values of lambda, the first the step's start, of which counts [n] are used.
    eta: [] or [n], as in `first_order`.
    slope: the kernel's first moment used with two nodes, h being the step's length in lambda:
      'exact'; 'midpoint', h / 2 times the kernel's integral (DPM-Solver++(2M), UniPC's B_2);
      'linear', (1 + eta) h^2 / 2 (UniPC's B_1, SA-Solver).
    curvature: factor on the second moment used with three nodes.
  """
  registry.check(SLOPES, slope, 'slope')
  lam = half_log_snr(grid)
  start, end = lam[:-1], lam[1:]
  rate = jnp.broadcast_to(1 + jnp.asarray(eta, lam.dtype), start.shape)[:, None]
  kernel = lambda u: rate * jnp.exp(rate * (u - end[:, None]))
  h = (end - start)[:, None]
  moment = lambda power: integrals(
    start[:, None], start, end, lambda u: kernel(u) * (u - start[:, None]) ** power
  )

  def weigh(count):
    used = nodes[:, :count]
    if count == 2 and slope != 'exact':
      first_moment = h / 2 * (moment(0) if slope == 'midpoint' else h * rate)
      other = first_moment / (used[:, 1:] - used[:, :1])
      return jnp.concatenate([-other, other], axis=1)
    result = integrals(used, start, end, kernel).at[:, :1].add(-moment(0))
    if count == 3 and curvature != 1:
      gaps = jnp.where(jnp.eye(3, dtype=bool), 1, used[:, :, None] - used[:, None, :])
      result -= (1 - curvature) * moment(2) / jnp.prod(gaps, axis=2)
    return result

  return grid[0][1:, None] * by_count(counts, nodes.shape[1], weigh)


def exponential_table(
  grid: Grid, order: int, eta=0.0, s_noise: float = 1.0, *, slope: str = 'exact',
  curvature: float = 1.0, lower_order_final: bool | int = False, euler_at_final: bool = False,
) -> Table:
  """The explicit exponential Adams method; arguments as in `exponential` and `step_orders`."""
  counts = step_orders(
    grid, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final
  )
  nodes = past_nodes(grid, half_log_snr(grid), counts, order)
  correction = exponential(grid, nodes, counts, eta, slope=slope, curvature=curvature)
  return Table(*first_order(grid, eta, s_noise), correction)


def corrector_table(
  grid: Grid, order: int, eta=0.0, s_noise: float = 1.0, *, slope: str,
  lower_order_final: bool | int = False,
) -> Table:
  """The implicit method of x_0 through `order` values: at the step's end, its start and before.

  Row i is of step i - 1, which ends where step i starts; row 0 is unused.
  """
  here, there = intervals(grid)
  before = step_orders(grid, order - 1, lower_order_final=lower_order_final)
  lam = half_log_snr(grid)
  past = past_nodes(grid, lam, before, order - 1)
  nodes = jnp.concatenate([past[:, :1], lam[1:, None], past[:, 1:]], axis=1)
  counts = jnp.where(is_inner(here, there) & moves(here, there), before + 1, 1)
  correction = exponential(grid, nodes, counts, eta, slope=slope)
  newest_first = jnp.concatenate([correction[:, 1:2], correction[:, :1], correction[:, 2:]], axis=1)
  table = Table(*first_order(grid, eta, s_noise), newest_first)
  return jax.tree.map(lambda rows: jnp.roll(rows, 1, axis=0), table)


def eps_table(
  grid: Grid, order: int, coordinate: Kernel, rate: Kernel, *, to_clean: bool = False,
  lower_order_final: bool | int = False,
) -> Table:
  """The explicit Adams method of eps, polynomial in u = coordinate(r): a' int l_j(u) dr.

  rate: dr / du as a function of u. to_clean: whether u is finite at r = 0.
  """
  alphas, sigmas, *_ = grid
  counts = step_orders(grid, order, to_clean=to_clean, lower_order_final=lower_order_final)
  levels = divide(sigmas, alphas)
  u = coordinate(levels if to_clean else jnp.where(levels > 0, levels, 1))
  nodes = past_nodes(grid, u, counts, order)

  def weigh(count):
    result = integrals(nodes[:, :count], u[:-1], u[1:], rate)
    return result.at[:, :1].add(-integrals(nodes[:, :1], u[:-1], u[1:], rate))

  correction = alphas[1:, None] * by_count(counts, order, weigh)
  return Table(*first_order(grid), correction)


def adams(
  denoise: Denoiser, table: Table, *, of_eps: bool = False, noise: Noise | None = None
) -> Steps:
  """The explicit method of `table` in x_0 or, with of_eps, eps."""
  order = table.correction.shape[1]

  def step(x, past, here, there, index, row):
    x0 = denoise(x, *here)
    value = epsilon(x, x0, here) if of_eps else x0
    values = (value.astype(x.dtype), *past)
    x = row.keep * x + row.clean * x0 + combine(row.correction, values)
    return (x + row.noise * noise(index, x) if noise else x), values[:-1], x0

  return Steps(step, (table,), carry=lambda x: (jnp.zeros_like(x),) * (order - 1))


def predict_correct(
  denoise: Denoiser, grid: Grid, predictor: Table, corrector: Table, noise: Noise | None = None
) -> Steps:
  """Predict with one table; the call at the predicted x corrects it with the other, same noise.

  The corrected x is not evaluated again. The last step is corrected only before a step from its end
  to itself, which calls.
  """
  k, c = predictor.correction.shape[1], corrector.correction.shape[1]
  here, there = intervals(grid)
  moving = moves(here, there)
  follows = jnp.concatenate([jnp.zeros_like(moving[:1]), moving[:-1]])
  taken = moving | (follows & real_steps(here, there))

  def step(x, carry, here, there, index, row, fix, follows):
    before, past, z = carry
    x0 = denoise(x, *here)
    values = (x0.astype(x.dtype), *past)
    corrected = fix.keep * before + fix.clean * past[0] + combine(fix.correction, values[:c])
    corrected = corrected + fix.noise * z if noise else corrected
    x = jnp.where(follows, corrected, x)
    z = noise(index, x) if noise else ()
    new = row.keep * x + row.clean * x0 + combine(row.correction, values[:k])
    kept = jax.tree.map(partial(jnp.where, moves(here, there)), values[:-1], past)
    return (new + row.noise * z if noise else new), (x, kept, z), x0

  def carry(x):
    zeros = jnp.zeros_like(x)
    return x, (zeros,) * (max(k, c) - 1), zeros if noise else ()

  return Steps(step, (predictor, corrector, follows), carry, taken)


@scanned
def dpmpp_2m_sde(
  denoise, grid, noise, *, eta=1.0, s_noise=1.0, slope='midpoint', lower_order_final=False,
  euler_at_final=False,
):
  """SDE-DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, section 5).

  eta: 1 is the reverse SDE, 0 DPM-Solver++(2M) (algorithm 2). s_noise: factor on the noise. slope:
  'midpoint', or 'exact' (k-diffusion: heun). lower_order_final, euler_at_final: see `step_orders`.
  """
  table = exponential_table(
    grid, 2, eta, s_noise, slope=slope, lower_order_final=lower_order_final,
    euler_at_final=euler_at_final,
  )
  return adams(denoise, table, noise=noise if eta else None)


@scanned
def dpmpp_3m_sde(
  denoise, grid, noise, *, eta=1.0, s_noise=1.0, slope='exact', curvature=0.5,
  lower_order_final=False, euler_at_final=False,
):
  """SDE-DPM-Solver++(3M) (k-diffusion, after Lu et al. 2022); arguments as in `dpmpp_2m_sde`.

  curvature: factor on the quadratic term; k-diffusion's and diffusers' half of the interpolation's
  leaves the method at order 2, 1 makes it of order 3.
  """
  table = exponential_table(
    grid, 3, eta, s_noise, slope=slope, curvature=curvature, lower_order_final=lower_order_final,
    euler_at_final=euler_at_final,
  )
  return adams(denoise, table, noise=noise if eta else None)


@scanned
def lms(denoise, grid, noise, *, order=4):
  """Adams-Bashforth in sigma / alpha for dy = eps dr (k-diffusion); full order to sigma = 0."""
  return adams(
    denoise, eps_table(grid, order, lambda r: r, jnp.ones_like, to_clean=True), of_eps=True
  )


@scanned
def deis(denoise, grid, noise, *, order=3, lower_order_final=False):
  """DEIS (Zhang & Chen 2023, section 3): eps a polynomial in ln(sigma / alpha), `order` values."""
  table = eps_table(grid, order, jnp.log, jnp.exp, lower_order_final=lower_order_final)
  return adams(denoise, table, of_eps=True)


@scanned
def unipc(denoise, grid, noise, *, order=2, variant='bh2', lower_order_final=True):
  """UniPC for x_0 (Zhao et al. 2023, algorithms 1 and 2): order p predicted, p + 1 corrected.

  order: p, of the predictor. lower_order_final: as in `step_orders`. variant: 'bh1' or 'bh2', the
  function B(h); it matters where two values are interpolated.
  """
  slopes = {'bh1': 'linear', 'bh2': 'midpoint'}
  slope = slopes[registry.check(slopes, variant, 'variant of unipc')]
  options = dict(slope=slope, lower_order_final=lower_order_final)
  predictor = exponential_table(grid, order, **options)
  return predict_correct(denoise, grid, predictor, corrector_table(grid, order + 1, **options))


@scanned
def sa_solver(
  denoise, grid, noise, *, tau=1.0, low=0.05, high=1.0, order=2, corrector_order=2, s_noise=1.0,
  lower_order_final=True,
):
  """SA-Solver, stochastic Adams methods for x_0 (Xue et al. 2023, algorithm 1).

  tau: 0 is the ODE, 1 the reverse SDE, at noise levels from low to high. order: values that the
  predictor interpolates; corrector_order: the corrector, one at the predicted x; 0 for none.
  s_noise: factor on the noise. lower_order_final: as in `step_orders`.
  """
  if corrector_order == 1:
    raise UserError('corrector_order of sa_solver is 1; choose 0 for none, or at least 2.')
  alphas, sigmas = intervals(grid)[0]
  eta = jnp.where((low * alphas <= sigmas) & (sigmas <= high * alphas), tau**2, 0.0)
  options = dict(slope='linear', lower_order_final=lower_order_final)
  predictor = exponential_table(grid, order, eta, s_noise, **options)
  noise = noise if tau else None
  if not corrector_order:
    return adams(denoise, predictor, noise=noise)
  corrector = corrector_table(grid, corrector_order, eta, s_noise, **options)
  return predict_correct(denoise, grid, predictor, corrector, noise)


@scanned
def pndm(denoise, grid, noise, *, runge_kutta=True, average='epsilon'):
  """Pseudo numerical methods (Liu et al. 2022, algorithm 2): Adams-Bashforth weights on eps.

  The weights are those of equal steps of time; the move, their transfer part, is DDIM's.

  Args:
    runge_kutta: start with three steps of the pseudo Runge-Kutta method, four calls each, at the
      grid's midpoints (its third part [n 2]: the ends of the first and second moves), or else
      halfway in log-SNR; otherwise (PLMS) with one step of improved Euler, two calls.
    average: what the weights average, 'epsilon' or, of variance-preserving processes,
      'v_prediction' = alpha eps - sigma x_0, whose mean is read as v where the step starts.
  """
  registry.check(('epsilon', 'v_prediction'), average, 'average of pndm')
  here, there = intervals(grid)
  rows = jnp.clip(jnp.cumsum(moves(here, there)) - 1, 0, 3)
  middles = grid[2] if len(grid) > 2 else jax.tree.map(
    lambda part: jnp.stack([part, part], axis=1), jax.vmap(log_midpoint)(here, there)
  )
  of_v = average == 'v_prediction'

  def value(x, x0, pair):
    eps = epsilon(x, x0, pair)
    return (pair[0] * eps - pair[1] * x0 if of_v else eps).astype(x.dtype)

  def step(x, past, here, there, index, row, middle):
    at = lambda x, pair: value(x, denoise(x, *pair), pair)
    to = lambda mean, pair: straight(x, here[0] * mean + here[1] * x if of_v else mean, here, pair)
    x0 = denoise(x, *here)
    first = value(x, x0, here)
    values = (first, *past)

    def improved_euler():
      return (first + at(to(first, there), there)) / 2

    def classical():
      before, after = ((middle[0][i], middle[1][i]) for i in (0, 1))
      second = at(to(first, before), after)
      third = at(to(second, after), after)
      fourth = at(to(third, there), there)
      return (first + 2 * second + 2 * third + fourth) / 6

    starts = (row < (3 if runge_kutta else 1)) & is_inner(here, there)
    start = classical if runge_kutta else improved_euler
    weights = jnp.asarray(ADAMS_BASHFORTH, x.dtype)[row]
    mean = jax.lax.cond(starts, start, lambda: combine(weights, values))
    moved = jnp.where(here[0] > 0, to(mean, there), move(x, x0, here, there))
    return moved, values[:-1], x0

  return Steps(step, (rows, middles), carry=lambda x: (jnp.zeros_like(x),) * 3)


LMS = SamplerInfo(lms, 4, 1, 'Adams-Bashforth of 4 steps in sigma / alpha', 'k-diffusion')
DEIS = SamplerInfo(deis, 3, 1, 'exponential multistep of eps', 'Zhang & Chen 2023')
DPMPP_2M = SamplerInfo(partial(dpmpp_2m_sde, eta=0.0), 2, 1, 'DPM-Solver++(2M)', 'Lu et al. 2022')
UNIPC = SamplerInfo(
  unipc, 3, 1, 'UniPC, predictor of order 2, corrector of order 3', 'Zhao et al. 2023'
)
DPMPP_2M_SDE = SamplerInfo(
  dpmpp_2m_sde, 2, 1, 'SDE-DPM-Solver++(2M)', 'Lu et al. 2022', stochastic=True
)
DPMPP_3M_SDE = SamplerInfo(
  dpmpp_3m_sde, 2, 1, 'SDE-DPM-Solver++(3M)', 'Lu et al. 2022', stochastic=True
)
SA_SOLVER = SamplerInfo(
  sa_solver, 2, 1, 'stochastic Adams predictor and corrector', 'Xue et al. 2023', stochastic=True
)
PLMS = SamplerInfo(
  partial(pndm, runge_kutta=False), 2, 1,
  'pseudo multistep of eps; one call more in the first step', 'Liu et al. 2022', more_calls=1,
)
PNDM = SamplerInfo(
  pndm, 2, 1, 'pseudo multistep of eps; in three steps four calls, midpoints in log-SNR',
  'Liu et al. 2022', more_calls=9,
)
