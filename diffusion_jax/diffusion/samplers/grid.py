"""Grids of (alpha, sigma) from noise to data: the noise levels that a sampler visits.

n steps have n + 1 pairs; the last is (1, 0), or, as some published schedulers end, the table's
first. Spacings are in time (leading, trailing, linspace, beta) or in the noise level r = sigma /
alpha (karras, exponential, polyexponential, tables), on a table of timesteps or a process.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.processes import Process, tabulate
from diffusion_jax.errors import UserError

if TYPE_CHECKING:
  from diffusion_jax.diffusion.noise import Schedule

Grid = tuple
"""(alphas [n + 1], sigmas [n + 1]) of n steps from noise to data.

A third part, (alphas [n ...], sigmas [n ...]), may name pairs for each step: where `ddim` lands if
not where the next step starts, where `tcd` jumps to before it adds noise, and the midpoints of
`pndm`.
"""

AYS_TABLES = {
  'ays_sd1': (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
  'ays_sdxl': (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
  'ays_svd': (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise levels of Align Your Steps (Sabour et al. 2024), ten steps and the level they end at."""

TIME_SPACINGS = ('trailing', 'leading', 'linspace', 'beta')
LEVEL_SPACINGS = ('karras', 'exponential', 'polyexponential', *AYS_TABLES)
SPACINGS = TIME_SPACINGS + LEVEL_SPACINGS


def spaced_timesteps(
  total: int, count: int, spacing: str, *, steps_offset: int = 0, drop_last: bool = False,
  fractional: bool = False, even: bool = False, last: float = 0.0,
  original_inference_steps: int = 50,
) -> np.ndarray:
  """`count` timesteps of [0, total) from high to low; UserError for a count or offset out of range.

  trailing contains total - 1, leading 0, linspace both ends (Lin et al. 2024, table 2; linspace
  rounds). beta has quantiles of Beta(.6, .6), dense at both ends (Lee et al. 2024), not rounded.
  distilled, for consistency models, strides the timesteps of the distillation from total - 1 on
  (Luo et al. 2023).

  Args:
    steps_offset: added to the timesteps of leading; Stable Diffusion 1 has 1.
    drop_last: leading and linspace place one more timestep and leave the last out, as the solvers
      DPM, UniPC and DEIS of diffusers do.
    fractional: linspace and trailing do not round; linspace as the schedulers of diffusers after
      k-diffusion, trailing as the pipelines of Flux.
    even: allow only counts that divide `total`.
    last: where linspace ends.
    original_inference_steps: number of timesteps of the distillation.
  """
  if not 1 <= count <= total:
    raise UserError(f'{count} sampling steps do not fit the schedule; choose 1 to {total}.')
  if even and total % count:
    raise UserError(
      f'{count} sampling steps do not divide the {total} timesteps evenly, as they must for this '
      'scheduler with trailing spacing; choose a number that does.'
    )
  if drop_last and spacing in ('leading', 'linspace'):
    options = dict(steps_offset=steps_offset, fractional=fractional)
    return spaced_timesteps(total, count + 1, spacing, **options)[:-1]
  if spacing == 'distilled':
    if not count <= original_inference_steps <= total:
      raise UserError(
        f'{count} sampling steps do not fit a model distilled at {original_inference_steps} of '
        f'{total} timesteps; choose at most {original_inference_steps}.'
      )
    known = np.arange(original_inference_steps, 0, -1) * (total // original_inference_steps) - 1
    return known[np.floor(np.linspace(0, len(known), count, endpoint=False)).astype(np.int64)]
  if spacing == 'trailing':
    steps = total * (1 - np.arange(count) / count) if fractional else np.round(
      np.arange(total, 0, -total / count)
    ).astype(np.int64)[:count]
    return steps - 1
  if spacing == 'leading':
    steps = np.arange(count)[::-1] * (total // count) + steps_offset
    if steps[0] >= total or steps[-1] < 0:
      raise UserError(
        f'{count} leading steps with an offset of {steps_offset} leave the {total} timesteps of '
        'the schedule; choose fewer steps.'
      )
    return steps
  if spacing == 'linspace':
    steps = np.linspace(total - 1, last, count)
    return steps if fractional else np.round(steps).astype(np.int64)
  if spacing == 'beta':
    return (total - 1) * _beta_quantiles(count)
  raise _unknown(spacing)


def _unknown(spacing: str) -> UserError:
  return UserError(f'step spacing {spacing!r} is unknown; choose {", ".join(SPACINGS)}.')


def _beta_quantiles(count: int) -> np.ndarray:
  """Quantiles of Beta(.6, .6) at 1, ..., 1 / count."""
  from scipy.special import betaincinv  # Takes long to import, and only this grid needs it.

  return betaincinv(0.6, 0.6, 1 - np.arange(count) / count)


def spaced_levels(
  count: int, spacing: str | Sequence[float], low: float, high: float, rho: float | None = None
) -> np.ndarray:
  """Noise levels [count], float64, falling from `high` to `low`, or those of a table.

  karras: r^(1/rho) linear (Karras et al. 2022, eq. 5), rho 7. polyexponential: ln r falls as (1 - i
  / (count - 1))^rho, rho 2; exponential: rho 1, geometric. A table, falling, its last level where a
  last step ends that does not end clean, is interpolated in ln r (Sabour et al. 2024).
  """
  if count < 1:
    raise UserError(f'{count} sampling steps are too few; choose at least 1.')
  spacing = AYS_TABLES.get(spacing, spacing) if isinstance(spacing, str) else tuple(spacing)
  if not isinstance(spacing, str):
    table = np.asarray(spacing, np.float64)
    if len(table) < 2 or not (np.diff(table) < 0).all() or table[-1] <= 0:
      raise UserError('A table of noise levels must fall and stay above 0; choose such levels.')
    positions = np.linspace(0, len(table) - 1, count + 1)
    return np.exp(np.interp(positions, np.arange(len(table)), np.log(table)))[:count]
  if not 0 < low < high < np.inf:
    raise UserError(
      f'{spacing} spacing needs noise levels between two finite bounds above 0, not {low} and '
      f'{high}; choose trailing spacing for a schedule that ends in pure noise.'
    )
  if spacing == 'karras':
    rho = 7.0 if rho is None else rho
    levels = np.linspace(high ** (1 / rho), low ** (1 / rho), count) ** rho
  elif spacing in ('exponential', 'polyexponential'):
    rho = 1.0 if spacing == 'exponential' else 2.0 if rho is None else rho
    levels = low * np.exp(np.linspace(1, 0, count) ** rho * np.log(high / low))
  else:
    raise _unknown(spacing)
  # Without the rounding of powers at both ends: a grid may end at `low` once more.
  levels[-1], levels[0] = low, high
  return levels


def _divide(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  with np.errstate(divide='ignore'):
    return p / q


def _is_vp(alphas: np.ndarray, sigmas: np.ndarray) -> bool:
  return np.allclose(alphas**2 + sigmas**2, 1, rtol=0, atol=1e-6)


def _between(alphas: np.ndarray, sigmas: np.ndarray, positions: np.ndarray):
  """Pairs at fractional positions of a table.

  sigma / alpha is linear between neighbours of a table of norm 1, as in diffusers; else, and next
  to alpha = 0, pairs lie on the chord, as in `common.pair_between`.
  """
  i = np.clip(np.floor(positions).astype(np.int64), 0, len(alphas) - 2)
  along = positions - i
  linear = lambda part: part[i] + along * (part[i + 1] - part[i])
  a, s = linear(alphas), linear(sigmas)
  if not _is_vp(alphas, sigmas):
    return a, s
  inner = alphas[i + 1] > 0
  level = linear(np.where(alphas > 0, sigmas / np.where(alphas > 0, alphas, 1), 0))
  a, s = np.where(inner, 1, a), np.where(inner, level, s)
  return a / np.hypot(a, s), s / np.hypot(a, s)


def _at_levels(alphas: np.ndarray, sigmas: np.ndarray, levels: np.ndarray):
  """Pairs of the given sigma / alpha between those of a table, or beyond its ends."""
  if _is_vp(alphas, sigmas):  # With the table's own first pair, so that both are equal.
    first, norm = levels == sigmas[0] / alphas[0], np.hypot(1, levels)
    return np.where(first, alphas[0], 1 / norm), np.where(first, sigmas[0], levels / norm)
  i = np.searchsorted(np.arctan2(sigmas, alphas), np.arctan(levels), side='right') - 1
  i = np.clip(i, 0, len(alphas) - 2)
  over = levels * alphas[i] - sigmas[i]
  return _between(alphas, sigmas, i + over / (np.diff(sigmas)[i] - levels * np.diff(alphas)[i]))


def _ended(alphas: np.ndarray, sigmas: np.ndarray, last: tuple[float, float] = (1.0, 0.0)) -> Grid:
  """A grid that ends with the clean pair, or another; in JAX's default floating dtype."""
  return _arrays(np.append(alphas, last[0]), np.append(sigmas, last[1]))


def _arrays(alphas: np.ndarray, sigmas: np.ndarray) -> tuple[jax.Array, jax.Array]:
  dtype = jnp.result_type(float)
  # Not by jnp.asarray, which is compiled for each length.
  return tuple(jax.device_put(part.astype(dtype)) for part in (alphas, sigmas))


def sampling_grid(
  schedule: 'Schedule', count: int, spacing: str | Sequence[float] = 'trailing',
  rho: float | None = None, *, set_alpha_to_one: bool = True, low: float | None = None,
  high: float | None = None, within: str | None = None, stay_at_end: bool = False,
  clipped: int = 0, via: str | None = None, share: float = 0.7, **places,
) -> Grid:
  """Grid of `count` steps on a table of timesteps, ended by the clean pair (1, 0).

  Args:
    schedule: only its `alphas` and `sigmas` are used, [T] from data to noise.
    spacing: one of SPACINGS, or a falling table of noise levels.
    set_alpha_to_one: end with the clean pair; otherwise with the table's first, as Stable
      Diffusion 1's scheduler does.
    low, high: noise levels between which level spacings run, instead of the table's ends.
    within: a spacing in time between whose levels they run, where `low` and `high` do not say.
    stay_at_end: end level spacings at their last level once more, instead of the table's first.
    clipped: how many of the noisiest timesteps spacings in time leave out.
    via: names a third part of the grid, timesteps for each of its steps from t to t', where a
      stride is T // count: 'stride', a stride below t; 'half_stride', half of one below t, and half
      of one above t', which is the same for even ones; 'share', `share` t'.
    places: the other arguments of `spaced_timesteps`, for spacings in time.
  """
  alphas, sigmas = (np.asarray(part, np.float64) for part in (schedule.alphas, schedule.sigmas))
  first = alphas[0], sigmas[0]
  spaced = lambda how: spaced_timesteps(len(alphas) - clipped, count, how, **places)
  if spacing in LEVEL_SPACINGS or not isinstance(spacing, str):
    ratios = _divide(sigmas, alphas)
    ends = ratios[[0, -1]] if within is None else np.interp(
      spaced(within)[[-1, 0]], np.arange(len(ratios)), ratios
    )
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    levels = spaced_levels(count, spacing, low, high, rho)
    pairs = _at_levels(alphas, sigmas, levels)
    first = (pairs[0][-1], pairs[1][-1]) if stay_at_end else first
    return _ended(*pairs, (1.0, 0.0) if set_alpha_to_one else first)
  steps = spaced(spacing)
  rounded = steps.dtype == np.int64
  pairs = (alphas[steps], sigmas[steps]) if rounded else _between(alphas, sigmas, steps)
  last = (1.0, 0.0) if set_alpha_to_one else first
  grid = _ended(*pairs, last)
  return grid if via is None else (*grid, _via(alphas, sigmas, steps, via, share, last))


def _via(alphas, sigmas, steps: np.ndarray, via: str, share: float, last: tuple[float, float]):
  """The third part of a grid of these timesteps (`sampling_grid`); `last` before timestep 0."""
  stride = len(alphas) // len(steps)
  if via == 'share':  # In float32, as the reference rounds.
    places = np.floor(np.float32(share) * np.append(steps[1:], 0).astype(np.float32))
  elif via == 'half_stride':
    places = np.stack([steps - stride // 2, steps - stride + stride // 2], axis=1)
  else:
    places = steps - stride
  places = places.astype(np.int64)
  pairs = (
    np.where(places < 0, end, part[np.maximum(places, 0)])
    for part, end in zip((alphas, sigmas), last, strict=True)
  )
  return _arrays(*pairs)


def level_grid(table: tuple[np.ndarray, np.ndarray], levels: np.ndarray) -> Grid:
  """Grid of the noise levels [n], falling, ended by the clean pair.

  table: (alphas, sigmas) [T], data to noise, of the pairs' process; two pairs suffice for VE, VP
  and flow, but not both ends of flow.
  """
  alphas, sigmas = (np.asarray(part, np.float64) for part in table)
  return _ended(*_at_levels(alphas, sigmas, np.asarray(levels, np.float64)))


def process_grid(
  process: Process, count: int, spacing: str | Sequence[float] = 'trailing',
  rho: float | None = None, first_time: float = 1e-3,
) -> Grid:
  """Grid of `count` steps on a process in continuous time, ended by the clean pair (1, 0).

  trailing: times 1, ..., 1 / count; linspace: 1 to first_time; leading and beta: as on timesteps,
  scaled to [first_time, 1]; levels: from r(1) to r(first_time). first_time: the earliest of a
  network call. UserError for a spacing that the process does not allow.
  """
  if count < 1:
    raise UserError(f'{count} sampling steps are too few; choose at least 1.')
  if spacing in LEVEL_SPACINGS or not isinstance(spacing, str):
    table = tabulate(process, np.linspace(first_time, 1, 2049))
    ends = _divide(table[1][[0, -1]], table[0][[0, -1]])
    return level_grid(table, spaced_levels(count, spacing, *ends, rho))
  fractions = {
    'trailing': lambda: 1 - np.arange(count) / count,
    'leading': lambda: np.arange(count)[::-1] / count,
    'linspace': lambda: np.linspace(1, 0, count) if count > 1 else np.ones(1),
    'beta': lambda: _beta_quantiles(count),
  }
  if spacing not in fractions:
    raise _unknown(spacing)
  times = fractions[spacing]()
  if spacing != 'trailing':
    times = first_time + (1 - first_time) * times
  return _ended(*tabulate(process, times))


def size_shift(
  tokens: int, base_shift: float, max_shift: float, base_image_seq_len: int,
  max_image_seq_len: int, time_shift_type: str = 'exponential',
) -> float:
  """Return what sigma / alpha is multiplied by for an image that a network reads as `tokens`.

  mu is linear in the tokens, base_shift at base_image_seq_len and max_shift at max_image_seq_len;
  the factor is e^mu, or mu itself where time_shift_type is 'linear'. UserError for none above 0.
  """
  slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
  mu = base_shift + slope * (tokens - base_image_seq_len)
  shift = float(np.exp(min(mu, 50.0))) if time_shift_type == 'exponential' else mu
  if not 0 < shift < 1e9:
    raise UserError(
      f'the schedule shifts the noise levels of an image of {tokens} patches by {shift:g}; choose '
      'another size.'
    )
  return shift


def shifted(grid: Grid, shift: float = 1.0, terminal: float | None = None) -> Grid:
  """A grid of a flow, alpha + sigma = 1, whose sigma / alpha are multiplied by `shift`.

  terminal: sigma of the last step, to which 1 - sigma is then stretched; None leaves it. UserError
  where a single step leaves nothing to stretch.
  """
  alphas, sigmas = (np.asarray(part, np.float64) for part in grid[:2])
  sigmas = shift * sigmas / (alphas + shift * sigmas)
  if terminal is not None:
    if sigmas[-2] >= 1:
      raise UserError('shift_terminal needs two sampling steps or more; choose more steps.')
    sigmas[:-1] = 1 - (1 - sigmas[:-1]) * (1 - terminal) / (1 - sigmas[-2])
  return _arrays(1 - sigmas, sigmas)


def padded(grid: Grid, steps: int) -> Grid:
  """A grid padded to `steps` steps with pairs (0, 0), which samplers skip, on the host.

  One compiled sampler so serves several lengths. ValueError for more steps.
  """
  more = steps - (len(grid[0]) - 1)
  if more < 0:
    raise ValueError(f'a grid of {len(grid[0]) - 1} steps cannot be padded to {steps}.')
  # In numpy, which compiles nothing for a new length.
  fill = lambda part: np.pad(np.asarray(part), [(0, more)] + [(0, 0)] * (np.ndim(part) - 1))
  return jax.tree.map(fill, tuple(grid))


def section(grid: Grid, first: Grid | None = None, last: Grid | None = None) -> Grid:
  """The steps of a grid that begin below the noise level of a pair `first`, and not below `last`.

  One model samples down to a level, another goes on from there (Balaji et al. 2022). UserError
  where no step does.
  """
  level = lambda pair: np.arctan2(*(np.asarray(part, np.float64) for part in pair[1::-1]))
  levels, small = level(grid)[:-1], 1e-6  # Below the distance of timesteps, above rounding.
  kept = np.ones(len(levels), bool)
  kept &= True if first is None else levels < level(first) - small
  kept &= True if last is None else levels >= level(last) - small
  if not kept.any():
    raise UserError(
      f'no step of {len(levels)} begins in that part of the noise levels; choose more steps.'
    )
  begin, end = np.flatnonzero(kept)[[0, -1]] + [0, 1]
  pairs = grid[0][begin : end + 1], grid[1][begin : end + 1]
  return *pairs, *(tuple(part[begin:end] for part in via) for via in grid[2:])


def part_way(grid: Grid, strength: float, up: bool = False) -> Grid:
  """The last round(strength n) steps of a grid, for image-to-image (Meng et al. 2022, SDEdit).

  up: rounded up, as diffusers' pipelines of flows do; those of U-Nets round down.
  Sampling starts from alpha x_0 + sigma eps of its first pair. UserError for a strength outside (0,
  1], or one that leaves no step.
  """
  count = len(grid[0]) - 1
  steps = count - int(count - count * strength) if up else round(strength * count)
  if not 0 < strength <= 1 or steps < 1:
    raise UserError(
      f'strength {strength} leaves no step of {count}; choose a fraction up to 1.'
    )
  pairs = grid[0][-steps - 1 :], grid[1][-steps - 1 :]
  return *pairs, *(tuple(part[-steps:] for part in via) for via in grid[2:])
