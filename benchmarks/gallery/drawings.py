"""Drawings of diffusion itself: schedules, errors and paths of samplers, scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.gallery import mixtures
from benchmarks.gallery.charts import (
  error_chart,
  lattice,
  schedules_chart,
  score_chart,
  trajectory_chart,
)
from benchmarks.gallery.page import Picture, Section
from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.noise import ScheduleConfig
from diffusion_jax.diffusion.processes import tabulate
from diffusion_jax.diffusion.samplers import info, sampler
from diffusion_jax.errors import UserError

EXPLODING = ('karras', 'exponential', 'polyexponential')

TABLES = {
  'scaled_linear': ScheduleConfig(),
  'rescale_betas_zero_snr': ScheduleConfig(rescale_betas_zero_snr=True),
  'shift 3': ScheduleConfig(shift=3.0),
  'linear': ScheduleConfig('linear', 1e-4, 0.02),
  'sigmoid': ScheduleConfig('sigmoid', 1e-4, 0.02),
}
"""Variants that a config's schedule can have; the first is Stable Diffusion's."""

CALLS = (8, 16, 32, 64, 128, 256)
OF_ERRORS = (
  'ddim', 'heun', 'dpmpp_2m', 'unipc', 'lms',
  'ddpm', 'dpmpp_2s_ancestral', 'dpmpp_2m_sde', 'sa_solver',
)
OF_PATHS = ('ddim', 'heun', 'dpmpp_2m', 'euler_ancestral', 'dpmpp_2m_sde', 'restart')
SCORE_LEVELS = (1.0, 0.5, 0.2)
REACH = 3.0


def schedules(samplers: Sequence[str] = ()) -> Iterator[Section]:
  """alpha, sigma and log-SNR of every named process, and of tables that a config can ask for."""
  del samplers
  times = np.linspace(0, 1, 257)
  named = {name: (times, *tabulate(processes.named(name), times)) for name in processes.PROCESSES}
  kept = {name: arrays for name, arrays in named.items() if name not in EXPLODING}
  exploding = {name: named[name] for name in EXPLODING}
  tables = {}
  for name, config in TABLES.items():
    alphas, sigmas = config.table()
    tables[name] = ((np.arange(len(alphas)) + 1) / len(alphas), alphas, sigmas)
  heads = {
    'schedules': ('Processes that end at unit noise', kept),
    'schedules_exploding': ('Processes whose noise explodes', exploding),
    'schedules_tables': ('Variants of a table of 1000 steps', tables),
  }
  yield Section('schedules', 'Schedules', (
    'A noised sample is x = α x₀ + σ ε. The log-SNR, ln(α² / σ²), falls as noise grows; what a '
    'sampler or a loss sees of a schedule is how fast. Where σ grows beyond 1, α stays 1.'
  ), tuple(
    Picture(name, heading, schedules_chart(of, title=heading), True)
    for name, (heading, of) in heads.items()
  ))


def errors(samplers: Sequence[str] = ()) -> Iterator[str | Section]:
  """Error against network calls: of deterministic samplers, and of stochastic ones."""
  names = samplers or OF_ERRORS
  found = {}
  for name in names:
    yield f'error of {name}'
    found[name] = mixtures.errors(name, CALLS)
  kinds = {
    'errors': (False, 'Deterministic samplers, two modes', 'mean |x − exact flow|', (1, 2, 3, 4)),
    'errors_stochastic': (
      True, 'Stochastic samplers, Gaussian data', '|standard deviation − exact|', (1, 2)
    ),
  }
  pictures = []
  for name, (stochastic, heading, label, orders) in kinds.items():
    of = {name: found[name] for name in names if info(name).stochastic == stochastic}
    if of:
      chart = error_chart(of, title=heading, ylabel=label, orders=orders)
      pictures.append(Picture(name, heading, chart, False))
  yield Section('errors', 'Errors of samplers', (
    'The denoiser is exact, so the error is the sampler’s own, on Karras steps from noise level '
    f'{mixtures.FIRST_LEVEL:g} to {mixtures.LAST_LEVEL:g}. Deterministic samplers are '
    'compared with the exact flow of a mixture of two modes. Stochastic ones have no such map; '
    'on Gaussian data the standard deviation of their samples is known without drawing any. A '
    'method of order p falls like the faint line of that order.'
  ), tuple(pictures))


def trajectories(samplers: Sequence[str] = ()) -> Iterator[str | Section]:
  """Paths of the same points under several samplers, in the plane."""
  names = samplers or OF_PATHS
  points = lattice(REACH, 121)
  density, _ = mixtures.field(points, 1.0, 0.0)
  pictures = []
  for name in names:
    yield f'paths of {name}'
    states = mixtures.paths(name).states
    kind = 'stochastic' if info(name).stochastic else 'deterministic'
    heading = f'{name}, {kind}'
    chart = trajectory_chart(states, title=f'Paths of {heading}', density=(points, density))
    pictures.append(Picture(f'trajectory_{name}', heading, chart, False))
  yield Section('trajectories', 'Paths of samplers', (
    f'The same {mixtures.PATHS} points of pure noise, taken by {mixtures.PATH_STEPS} steps '
    'to a mixture of five modes, whose exact density is the blue below. Deterministic samplers '
    'agree on where a point goes; stochastic ones wander, and reach the same density.'
  ), tuple(pictures))


def scores(samplers: Sequence[str] = ()) -> Iterator[Section]:
  """The score of the noised mixture at falling noise levels, and its density."""
  del samplers
  fine, coarse = lattice(REACH, 121), lattice(REACH * 0.95, 19)
  pictures = []
  for level in SCORE_LEVELS:
    density, _ = mixtures.field(fine, 1.0, level)
    _, vectors = mixtures.field(coarse, 1.0, level)
    heading = f'Score at σ / α = {level:g}'
    chart = score_chart(coarse, vectors, title=heading, density=(fine, density))
    pictures.append(Picture(f'score_{level:g}'.replace('.', '_'), heading, chart, False))
  yield Section('scores', 'Scores', (
    'The arrows are the gradient of the log-density of the noised data, what a network learns in '
    'one form or another. With much noise they point to the mean of all modes, with little each to '
    'the nearest; the longest are cut.'
  ), tuple(pictures))


DRAWINGS: Mapping[str, Callable] = {
  'schedules': schedules, 'errors': errors, 'trajectories': trajectories, 'scores': scores,
}


def draw(what: Sequence[str] = (), samplers: Sequence[str] = ()) -> Iterator[str | Section]:
  """Each finished section, and in between what is being computed.

  Args:
    what: keys of DRAWINGS; all if empty.
    samplers: which to draw in errors and trajectories; a choice of each if empty.

  Raises:
    UserError: an unknown drawing or sampler, or one that has no errors to draw; at once.
  """
  for name in what:
    if name not in DRAWINGS:
      raise UserError(f'drawing {name!r} is unknown; choose from {", ".join(DRAWINGS)}.')
  what = what or tuple(DRAWINGS)
  for name in samplers:
    (mixtures.check_measurable if 'errors' in what else sampler)(name)
  return _parts(what, samplers)


def _parts(what: Sequence[str], samplers: Sequence[str]) -> Iterator[str | Section]:
  for name in what:
    yield from DRAWINGS[name](samplers)
