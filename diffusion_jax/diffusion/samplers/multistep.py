"""Multistep samplers: one network call a step; the estimates of earlier steps raise the order.

The first steps have no past, and a step to sigma = 0 no finite log-SNR: these are of lower order.
A step from a pair to itself is as if the grid did not have it, but that a corrector uses its call.
All coefficients depend on the grid alone and are computed before the scan (`weights`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.denoiser import Denoiser
from diffusion_jax.diffusion.samplers.common import (
  Keys,
  Noise,
  Trajectory,
  as_arrays,
  epsilon,
  intervals,
  is_inner,
  log_midpoint,
  move,
  moves,
  noise_source,
  real_steps,
  straight,
  walk,
)
from diffusion_jax.diffusion.samplers.grid import Grid
from diffusion_jax.diffusion.samplers.weights import (
  Table,
  corrector_table,
  eps_table,
  exponential_table,
)
from diffusion_jax.errors import UserError
from diffusion_jax.types import Latents

ADAMS_BASHFORTH = np.array(
  [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
   [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)


def combine(correction: jax.Array, values: tuple[Latents, ...]) -> Latents:
  """sum_j correction_j values_j, elementwise: a matrix product would round on accelerators."""
  return sum(c * value for c, value in zip(correction, values, strict=True))


def adams(
  denoise: Denoiser, x: Latents, grid: Grid, table: Table, *,
  of_eps: bool = False, noise: Noise | None = None, trajectory: bool = False,
) -> Latents | Trajectory:
  """An explicit linear multistep method with the coefficients of `table`.

  Args:
    of_eps: whether the values interpolated are eps rather than x_0.
    noise: None for a deterministic method.
  """
  order = table.correction.shape[1]

  def step(x, past, here, there, index, row):
    x0 = denoise(x, *here)
    value = epsilon(x, x0, here) if of_eps else x0
    values = (value.astype(x.dtype), *past)
    x = row.keep * x + row.clean * x0 + combine(row.correction, values)
    return (x + row.noise * noise(index, x) if noise else x), values[:-1], x0

  memory = lambda x: (jnp.zeros_like(x),) * (order - 1)
  return walk(step, x, grid, (table,), memory=memory, trajectory=trajectory)


def predict_correct(
  denoise: Denoiser, x: Latents, grid: Grid, predictor: Table, corrector: Table, *,
  noise: Noise | None = None, trajectory: bool = False,
) -> Latents | Trajectory:
  """Predicts with one table; the call at the predicted x corrects it with the other.

  The corrected x is not evaluated again. A step's prediction and correction share their noise. The
  last step is corrected only if one from its end to itself follows: that one calls, too.
  """
  k, c = predictor.correction.shape[1], corrector.correction.shape[1]
  here, there = intervals(grid)
  moving = moves(here, there)
  follows = jnp.concatenate([jnp.zeros_like(moving[:1]), moving[:-1]])
  taken = moving | (follows & real_steps(here, there))

  def step(x, memory, here, there, index, row, fix, follows):
    before, past, z = memory
    x0 = denoise(x, *here)
    values = (x0.astype(x.dtype), *past)
    corrected = fix.keep * before + fix.clean * past[0] + combine(fix.correction, values[:c])
    corrected = corrected + fix.noise * z if noise else corrected
    x = jnp.where(follows, corrected, x)
    z = noise(index, x) if noise else ()
    new = row.keep * x + row.clean * x0 + combine(row.correction, values[:k])
    kept = jax.tree.map(partial(jnp.where, moves(here, there)), values[:-1], past)
    return (new + row.noise * z if noise else new), (x, kept, z), x0

  def memory(x):
    zeros = jnp.zeros_like(x)
    return x, (zeros,) * (max(k, c) - 1), zeros if noise else ()

  return walk(
    step, x, grid, (predictor, corrector, follows), memory=memory, taken=taken,
    trajectory=trajectory,
  )


def dpmpp_2m(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  lower_order_final: bool | int = False, euler_at_final: bool = False, trajectory: bool = False,
) -> Latents | Trajectory:
  """DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, algorithm 2).

  Args:
    lower_order_final, euler_at_final: as in `dpmpp_2m_sde`.
  """
  return dpmpp_2m_sde(
    denoise, x, grid, keys, eta=0.0, lower_order_final=lower_order_final,
    euler_at_final=euler_at_final, trajectory=trajectory,
  )


def dpmpp_2m_sde(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, slope: str = 'midpoint',
  lower_order_final: bool | int = False, euler_at_final: bool = False, trajectory: bool = False,
) -> Latents | Trajectory:
  """SDE-DPM-Solver++(2M) (Lu et al. 2022, DPM-Solver++, section 5).

  Args:
    eta: 1 is the reverse SDE, 0 `dpmpp_2m`.
    s_noise: factor on the noise.
    slope: 'midpoint', or 'exact', which k-diffusion names heun.
    lower_order_final: interpolate no more values than there are steps left; a number: on grids of
      fewer steps than that. euler_at_final: interpolate nothing in the last step. One to sigma = 0
      never does.

  Raises:
    UserError: for an unknown slope.
  """
  x, grid = as_arrays(x, grid)
  table = exponential_table(
    grid, 2, eta, slope=slope, lower_order_final=lower_order_final, euler_at_final=euler_at_final
  )
  return _with_noise(denoise, x, grid, keys, table, eta, s_noise, trajectory)


def dpmpp_3m_sde(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  eta: float = 1.0, s_noise: float = 1.0, slope: str = 'exact', curvature: float = 0.5,
  lower_order_final: bool | int = False, euler_at_final: bool = False, trajectory: bool = False,
) -> Latents | Trajectory:
  """SDE-DPM-Solver++(3M) (k-diffusion, after Lu et al. 2022).

  Args:
    eta: 1 is the reverse SDE, 0 the ODE.
    s_noise: factor on the noise.
    slope: of steps that interpolate two values, as in `dpmpp_2m_sde`.
    curvature: factor on the quadratic term. k-diffusion and diffusers take half of what
      interpolation gives, which leaves the method at order 2; 1 makes it of order 3.
    lower_order_final, euler_at_final: as in `dpmpp_2m_sde`.
  """
  x, grid = as_arrays(x, grid)
  table = exponential_table(
    grid, 3, eta, slope=slope, curvature=curvature, lower_order_final=lower_order_final,
    euler_at_final=euler_at_final,
  )
  return _with_noise(denoise, x, grid, keys, table, eta, s_noise, trajectory)


def _with_noise(denoise, x, grid, keys, table, eta, s_noise, trajectory):
  table = table._replace(noise=s_noise * table.noise)
  noise = noise_source(keys) if eta else None
  return adams(denoise, x, grid, table, noise=noise, trajectory=trajectory)


def lms(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  order: int = 4, trajectory: bool = False,
) -> Latents | Trajectory:
  """Adams-Bashforth in r = sigma / alpha for dy = eps dr (k-diffusion); full order to sigma = 0."""
  del keys
  x, grid = as_arrays(x, grid)
  table = eps_table(grid, order, lambda r: r, jnp.ones_like, to_clean=True)
  return adams(denoise, x, grid, table, of_eps=True, trajectory=trajectory)


def deis(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  order: int = 3, lower_order_final: bool | int = False, trajectory: bool = False,
) -> Latents | Trajectory:
  """DEIS (Zhang & Chen 2023, section 3) with eps a polynomial in ln(sigma / alpha).

  Args:
    order: values that are interpolated; lower_order_final: as in `dpmpp_2m_sde`.
  """
  del keys
  x, grid = as_arrays(x, grid)
  table = eps_table(grid, order, jnp.log, jnp.exp, lower_order_final=lower_order_final)
  return adams(denoise, x, grid, table, of_eps=True, trajectory=trajectory)


def pndm(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  runge_kutta: bool = True, average: str = 'epsilon', trajectory: bool = False,
) -> Latents | Trajectory:
  """Pseudo numerical methods (Liu et al. 2022, algorithm 2): Adams-Bashforth weights on eps.

  The weights are those of equal steps of time; the move, their transfer part, is DDIM's.

  Args:
    runge_kutta: start with three steps of the pseudo Runge-Kutta method, four calls each, their
      midpoints those of the grid (its third part [n 2]: where the first move ends, and where the
      second does and the network is called), or else halfway in log-SNR; otherwise (PLMS) with one
      step of the improved Euler method, two calls.
    average: what the weights average, 'epsilon' or, of variance-preserving processes,
      'v_prediction' = alpha eps - sigma x_0, whose mean is read as v where the step starts.

  Raises:
    UserError: for another average.
  """
  if average not in ('epsilon', 'v_prediction'):
    raise UserError(f'average of pndm is {average!r}; choose epsilon or v_prediction.')
  del keys
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
    del index
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

  memory = lambda x: (jnp.zeros_like(x),) * 3
  return walk(step, x, grid, (rows, middles), memory=memory, trajectory=trajectory)


def unipc(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  order: int = 2, variant: str = 'bh2', lower_order_final: bool | int = True,
  trajectory: bool = False,
) -> Latents | Trajectory:
  """UniPC for x_0 (Zhao et al. 2023, algorithms 1 and 2): order p predicted, p + 1 corrected.

  Args:
    order: p, of the predictor.
    variant: 'bh1' or 'bh2', the function B(h); it matters where two values are interpolated.
    lower_order_final: as in `dpmpp_2m_sde`.

  Raises:
    UserError: for an unknown variant.
  """
  del keys
  slopes = {'bh1': 'linear', 'bh2': 'midpoint'}
  if variant not in slopes:
    raise UserError(f'variant of unipc is {variant!r}; choose one of {", ".join(slopes)}.')
  x, grid = as_arrays(x, grid)
  options = dict(slope=slopes[variant], lower_order_final=lower_order_final)
  predictor = exponential_table(grid, order, **options)
  corrector = corrector_table(grid, order + 1, **options)
  return predict_correct(denoise, x, grid, predictor, corrector, trajectory=trajectory)


def sa_solver(
  denoise: Denoiser, x: Latents, grid: Grid, keys: Keys, *,
  tau: float = 1.0, low: float = 0.05, high: float = 1.0, order: int = 2, corrector_order: int = 2,
  s_noise: float = 1.0, lower_order_final: bool | int = True, trajectory: bool = False,
) -> Latents | Trajectory:
  """SA-Solver, stochastic Adams methods for x_0 (Xue et al. 2023, algorithm 1).

  Args:
    tau: strength of the noise: 0 is the ODE, 1 the reverse SDE.
    low, high: noise levels sigma / alpha between which tau applies; 0 elsewhere.
    order: values that the predictor interpolates; corrector_order: values that the corrector does,
      one of them at the predicted x; 0 for no corrector.
    s_noise: factor on the noise.
    lower_order_final: as in `dpmpp_2m_sde`.

  Raises:
    UserError: for a corrector_order of 1.
  """
  if corrector_order == 1:
    raise UserError('corrector_order of sa_solver is 1; choose 0 for none, or at least 2.')
  x, grid = as_arrays(x, grid)
  alphas, sigmas = intervals(grid)[0]
  eta = jnp.where((low * alphas <= sigmas) & (sigmas <= high * alphas), tau**2, 0.0)
  options = dict(slope='linear', lower_order_final=lower_order_final)
  predictor = exponential_table(grid, order, eta, **options)
  predictor = predictor._replace(noise=s_noise * predictor.noise)
  noise = noise_source(keys) if tau else None
  if not corrector_order:
    return adams(denoise, x, grid, predictor, noise=noise, trajectory=trajectory)
  corrector = corrector_table(grid, corrector_order, eta, **options)
  corrector = corrector._replace(noise=s_noise * corrector.noise)
  return predict_correct(
    denoise, x, grid, predictor, corrector, noise=noise, trajectory=trajectory
  )
