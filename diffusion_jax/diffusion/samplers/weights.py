"""Weights of multistep samplers: integrals of interpolation polynomials over one step.

An Adams method replaces the estimate m (x_0 or eps) over a step by the polynomial through its
values at the pairs visited last. Here the weights of a whole grid are computed, before any network
call, as corrections to the first order: x' = keep x + clean x_0 + noise z + sum_j correction_j
m_{i-j}, with corrections of sum 0. They are 0 where there is no such polynomial: no past yet,
alpha = 0, or sigma' = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.samplers.common import (
  contraction,
  divide,
  intervals,
  is_inner,
  moves,
  step_count,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.errors import UserError

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)

SLOPES = ('exact', 'midpoint', 'linear')

Kernel = Callable[[jax.Array], jax.Array]


class Table(NamedTuple):
  """Coefficients of n steps: keep, clean and noise [n], correction [n k] of the last k values."""

  keep: jax.Array
  clean: jax.Array
  noise: jax.Array
  correction: jax.Array


def first_order(grid: Grid, eta=0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
  """keep, clean and noise [n] of the exponential integrator of the reverse SDE with x_0 held.

  x' = s'/s q^eta x + a' (1 - q^(1 + eta)) x_0 + s' sqrt(1 - q^(2 eta)) z with q = r' / r (Lu et al.
  2022, DPM-Solver++, section 5; Xue et al. 2023, SA-Solver, with eta = tau^2).

  Args:
    eta: [] or [n]; 0 is the ODE (DDIM), 1 the reverse SDE.
  """
  here, there = intervals(grid)
  slower = contraction(here, there) ** jnp.asarray(eta, grid[0].dtype)
  keep = divide(there[1], here[1]) * slower
  return keep, there[0] - keep * here[0], there[1] * jnp.sqrt((1 - slower) * (1 + slower))


def usable(
  grid: Grid, order: int, *, to_clean: bool = False, lower_order_final: bool | int = False,
  euler_at_final: bool = False,
) -> jax.Array:
  """How many values [n], at most `order`, each step may interpolate, its own included.

  Steps that do not move have none: they are not among those that later steps look back to.

  Args:
    to_clean: whether the formulas also hold for a step to sigma = 0.
    lower_order_final: interpolate no more values than there are steps left; a number: on grids of
      fewer steps than that.
    euler_at_final: interpolate nothing in the last step.
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
  """Nodes [n order]: for j < counts[i] the value where the j-th last moving step started.

  Beyond them they are made up, and distinct.

  Args:
    values: [n+1], of the grid's pairs.
    counts: [n], of `usable`.
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
  """int_start^end kernel(u) l_j(u) du [n k] by 16 points of Gauss-Legendre; start and end [n].

  Exact for polynomial kernels, and to 1e-13 for exp over steps of up to 20.

  Args:
    kernel: u [n q] -> [n q].
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


def half_log_snr(grid: Grid) -> jax.Array:
  """ln(alpha / sigma) [n+1]; 0 in place of infinities, which no formula may use."""
  alphas, sigmas, *_ = grid
  finite = (alphas > 0) & (sigmas > 0)
  return jnp.where(finite, jnp.log(jnp.where(finite, divide(alphas, sigmas), 1)), 0)


def exponential(
  grid: Grid, nodes: jax.Array, counts: jax.Array, eta=0.0, *,
  slope: str = 'exact', curvature: float = 1.0,
) -> jax.Array:
  """Corrections [n k] to `first_order` for the polynomial through values of x_0 at `nodes`.

  The exact weights are a' (1 + eta) int exp((1 + eta) (u - lambda')) l_j(u) du over the step, with
  lambda = ln(alpha / sigma) (Lu et al. 2022, DPM-Solver++, section 4; Xue et al. 2023).

  Args:
    nodes: [n k], values of lambda; the first is the start of the step.
    counts: [n], how many of the nodes are used.
    eta: [] or [n], as in `first_order`.
    slope: the kernel's first moment used with two nodes, h being the step's length in lambda:
      'exact'; 'midpoint', h / 2 times the kernel's integral (DPM-Solver++(2M), UniPC's B_2);
      'linear', (1 + eta) h^2 / 2 (UniPC's B_1, SA-Solver).
    curvature: factor on the second moment used with three nodes.

  Raises:
    UserError: for an unknown slope.
  """
  if slope not in SLOPES:
    raise UserError(f'slope is {slope!r}; choose one of {", ".join(SLOPES)}.')
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
  grid: Grid, order: int, eta=0.0, *, slope: str = 'exact', curvature: float = 1.0,
  lower_order_final: bool | int = False, euler_at_final: bool = False,
) -> Table:
  """The explicit exponential Adams method of x_0 that interpolates `order` values.

  Args:
    eta, slope, curvature: as in `exponential`; the others as in `usable`.
  """
  counts = usable(
    grid, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final
  )
  nodes = past_nodes(grid, half_log_snr(grid), counts, order)
  correction = exponential(grid, nodes, counts, eta, slope=slope, curvature=curvature)
  return Table(*first_order(grid, eta), correction)


def corrector_table(
  grid: Grid, order: int, eta=0.0, *, slope: str, lower_order_final: bool | int = False
) -> Table:
  """The implicit method of x_0 interpolating `order` values: of its end, its start and before.

  Row i belongs to step i - 1, whose end is where step i starts; row 0 to none.

  Args:
    eta, slope: as in `exponential`; lower_order_final: as in `usable`, its end not counted.
  """
  here, there = intervals(grid)
  before = usable(grid, order - 1, lower_order_final=lower_order_final)
  lam = half_log_snr(grid)
  past = past_nodes(grid, lam, before, order - 1)
  nodes = jnp.concatenate([past[:, :1], lam[1:, None], past[:, 1:]], axis=1)
  counts = jnp.where(is_inner(here, there) & moves(here, there), before + 1, 1)
  correction = exponential(grid, nodes, counts, eta, slope=slope)
  newest_first = jnp.concatenate([correction[:, 1:2], correction[:, :1], correction[:, 2:]], axis=1)
  table = Table(*first_order(grid, eta), newest_first)
  return jax.tree.map(lambda rows: jnp.roll(rows, 1, axis=0), table)


def eps_table(
  grid: Grid, order: int, coordinate: Kernel, rate: Kernel, *, to_clean: bool = False,
  lower_order_final: bool | int = False,
) -> Table:
  """The explicit Adams method of eps, polynomial in u = coordinate(r): a' int l_j(u) dr.

  Args:
    rate: dr / du as a function of u.
    to_clean: whether u is finite at r = 0.
    lower_order_final: as in `usable`.
  """
  alphas, sigmas, *_ = grid
  counts = usable(grid, order, to_clean=to_clean, lower_order_final=lower_order_final)
  levels = divide(sigmas, alphas)
  u = coordinate(levels if to_clean else jnp.where(levels > 0, levels, 1))
  nodes = past_nodes(grid, u, counts, order)

  def weigh(count):
    result = integrals(nodes[:, :count], u[:-1], u[1:], rate)
    return result.at[:, :1].add(-integrals(nodes[:, :1], u[:-1], u[1:], rate))

  correction = alphas[1:, None] * by_count(counts, order, weigh)
  return Table(*first_order(grid), correction)
