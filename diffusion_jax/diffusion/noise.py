"""Noise levels over time, and their labels for networks.

A `NoiseSchedule` is a process t -> (alpha, sigma) in continuous time, or as a `Schedule` a table of
T timesteps made from one. Models, objectives and samplers share one such object.

Index i of a table is time t = (i + 1) / T of a process; t = 0 is the clean pair (1, 0). Published
betas are a process's rate per step, beta_i = rate(i / (T - 1)); other processes are sampled.
`Schedule.process` interpolates a table back to continuous time.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import convert
from diffusion_jax.diffusion import processes
from diffusion_jax.diffusion.parameterization import noise_label
from diffusion_jax.diffusion.processes import Process, tabulate
from diffusion_jax.diffusion.samplers.grid import Grid, process_grid, sampling_grid
from diffusion_jax.errors import UserError
from diffusion_jax.limits import OneOf, Range
from diffusion_jax.types import Params, PerExample


def cosine_betas(steps: int, cap: float = 0.999) -> np.ndarray:
  """Return Nichol & Dhariwal's betas (2021, eq. 17, s = 0.008), at most `cap`."""
  alphas, _ = tabulate(processes.cosine(), np.arange(steps + 1) / steps)
  return np.minimum(1 - (alphas[1:] / alphas[:-1]) ** 2, cap)


def _betas(rate: Callable[[float, float], processes.Rate]):
  return lambda steps, start, end: rate(start, end)(np.linspace(0, 1, steps))


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
  'linear': _betas(processes.linear_rate),  # DDPM: from 1e-4 to 0.02 in 1000 steps.
  'scaled_linear': _betas(processes.scaled_linear_rate),  # Stable Diffusion: 0.00085 to 0.012.
  'sigmoid': _betas(processes.sigmoid_rate),
  'cosine': lambda steps, start, end: cosine_betas(steps, end),
  # The name in diffusers, where beta_end is no cap.
  'squaredcos_cap_v2': lambda steps, start, end: cosine_betas(steps),
}
"""Functions of (T, beta_start, beta_end)."""

SAMPLED: dict[str, Callable[[], Process]] = {
  'flow': processes.flow, 'log_linear': processes.log_linear,
}
"""Schedules that are a process at T times, without betas."""


def zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
  """Shift and scale sqrt(alpha_bar) [T]: the last step is pure noise (Lin et al. 2024, alg. 1)."""
  root = np.sqrt(alpha_bar)
  return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


MOST_TIMESTEPS = 100_000
"""The longest table of noise levels; published ones have 1,000 to 4,000."""

LABELS = ('exact', 'nearest', 'down', 'sigma')
"""Labels while sampling: the fractional timestep, rounded, rounded down; sigma T of a flow."""

LEARNED = 'learned'

NETWORK_LABELS = ('timestep', 'log_snr', 'sigma')
"""Labels on a process: ln(sigma / alpha) stretched to [0, num_train_timesteps],
ln(sigma / alpha) / 4, or sigma num_train_timesteps."""


def log_level(alpha, sigma, numpy=jnp):
  """ln(sigma / alpha), within +-24 ln 2 = 16.6; alpha and sigma are arrays of `numpy`'s."""
  least = 2.0**-24
  return numpy.log(numpy.maximum(sigma, least * alpha) / numpy.maximum(alpha, least * sigma))


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """A table of `num_train_timesteps` noise levels; names follow diffusers' scheduler_config.

  beta_schedule: a key of BETAS (with beta_start and beta_end per step) or of SAMPLED. shift: factor
  on sigma / alpha at every step, above 1 for images larger than the schedule's own (the ratio of
  edges: Esser et al. 2024, 5.3.2). last_alpha_bar: alpha^2 of the last step where
  rescale_betas_zero_snr leaves 0; 2^-24 in schedulers of diffusers that compute in sigma / alpha.
  """

  beta_schedule: Annotated[str, OneOf(BETAS | SAMPLED)] = 'scaled_linear'
  beta_start: Annotated[float, Range(0, 1, below=True)] = 0.00085
  beta_end: Annotated[float, Range(0, 1, below=True)] = 0.012
  num_train_timesteps: Annotated[int, Range(2, MOST_TIMESTEPS)] = 1000
  rescale_betas_zero_snr: bool = False
  shift: Annotated[float, Range(0, math.inf, above=True, below=True, text='a number above 0')] = 1.0
  last_alpha_bar: Annotated[float, Range(0, 1, below=True)] = 0.0

  def __post_init__(self):
    # Published files are read into this, too: their values are held against the types here.
    for field, hint in get_type_hints(type(self), include_extras=True).items():
      convert(hint, getattr(self, field), f'schedule.{field}')
    if self.rescale_betas_zero_snr and self.beta_schedule not in BETAS:
      raise UserError(
        f'schedule.rescale_betas_zero_snr is True, but there are no betas to rescale in '
        f'{self.beta_schedule!r}; choose one of {", ".join(BETAS)}.'
      )

  def table(self) -> tuple[np.ndarray, np.ndarray]:
    """Return (alphas [T], sigmas [T]) float64, from little noise to much."""
    steps = self.num_train_timesteps
    times = np.arange(1, steps + 1) / steps
    if self.beta_schedule == 'flow':
      return tabulate(processes.flow(self.shift), times)
    if self.beta_schedule in SAMPLED:
      alphas, sigmas = tabulate(SAMPLED[self.beta_schedule](), times)
    else:
      betas = BETAS[self.beta_schedule](steps, self.beta_start, self.beta_end)
      alpha_bar = np.cumprod(1 - betas)
      if self.rescale_betas_zero_snr:
        alpha_bar = zero_terminal_snr(alpha_bar)
        alpha_bar[-1] = self.last_alpha_bar
      alphas, sigmas = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if self.shift != 1:
      return processes.shift_pair(alphas, sigmas, self.shift)
    return alphas, sigmas


class Level(NamedTuple):
  """One noise level an example, each [b]; position in [0, 1) grows with the noise."""

  alpha: PerExample
  sigma: PerExample
  label: PerExample
  position: PerExample


@dataclasses.dataclass(frozen=True)
class NoiseConfig(ScheduleConfig):
  """A table of timesteps, or a process in continuous time.

  process: 'table', for the T timesteps of the fields of `ScheduleConfig`, or a name of
  `processes.PROCESSES` with its process_options, such as {'sigma_max': 50.0}, or 'learned', a
  log_linear one whose way between its ends is learned with the network. sub_vp: the sub-VP
  process of that one. label: one of NETWORK_LABELS, on a process; of a table of beta_schedule flow,
  'sigma' is sigma num_train_timesteps, as published flows are told.
  """

  process: Annotated[str, OneOf(('table', LEARNED, *processes.PROCESSES))] = 'table'
  process_options: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
  sub_vp: bool = False
  label: Annotated[str, OneOf(NETWORK_LABELS)] = 'timestep'

  def __post_init__(self):
    super().__post_init__()
    if self.is_table:
      flow = self.beta_schedule == 'flow' and self.label == 'sigma'
      if self.process_options or self.sub_vp or (self.label != 'timestep' and not flow):
        raise UserError(
          'process_options, sub_vp and label have no effect on a table; choose another process.'
        )
      return
    for field in dataclasses.fields(ScheduleConfig):
      changed = getattr(self, field.name) != field.default
      if changed and (field.name != 'num_train_timesteps' or self.label == 'log_snr'):
        raise UserError(
          f'schedule.{field.name} has no effect on the process {self.process}; remove it, or set '
          'process to table.'
        )
    self.make_process()

  def make_process(self) -> Process:
    """Return the process; one that is learned as it is before training."""
    name = 'log_linear' if self.process == LEARNED else self.process
    process = processes.named(name, **self.process_options)
    return processes.sub_vp(process) if self.sub_vp else process

  @property
  def is_table(self) -> bool:
    return self.process == 'table'

  def saved(self) -> dict:
    """Return the fields that a file should keep: those of the table, or those of the process."""
    values = dataclasses.asdict(self)
    table = [field.name for field in dataclasses.fields(ScheduleConfig)]
    table += ['label'] * (self.label != 'timestep')
    process = ['num_train_timesteps', 'process', 'process_options', 'sub_vp', 'label']
    return {name: values[name] for name in (table if self.is_table else process)}


class NoiseSchedule:
  """The noise levels of a model in continuous time; `Schedule` has those of a table.

  Attributes:
    config: its config, or None.
    process: t in [0, 1] -> (alpha, sigma).
    table: the schedule itself if it is one of T timesteps, or None.
    t_min: the earliest time at which the network is trained.
    kind: one of NETWORK_LABELS; timesteps: largest label, or factor of the labels.
    label_range: the labels' largest absolute value.
  """

  table: 'Schedule | None' = None

  def __init__(
    self, process: Process, *, t_min: float = 1e-3, kind: str = 'log_snr', timesteps: int = 1000,
    config: NoiseConfig | None = None,
  ):
    self.process, self.config, self.t_min = process, config, t_min
    self.kind, self.timesteps = kind, timesteps
    self.label_range = 2.5 if kind == 'log_snr' else float(timesteps)

  @staticmethod
  def of(config: ScheduleConfig) -> 'NoiseSchedule':
    """Return what a config describes."""
    if type(config) is ScheduleConfig:
      config = NoiseConfig(**dataclasses.asdict(config))
    if config.is_table:
      return Schedule(config)
    return NoiseSchedule(
      config.make_process(), t_min=0.0 if config.process == LEARNED else 1e-3, kind=config.label,
      timesteps=config.num_train_timesteps, config=config,
    )

  @property
  def learnable(self) -> bool:
    """True if the process has parameters."""
    return self.config is not None and self.config.process == LEARNED

  def initialize(self, key: jax.Array) -> Params:
    """Return fresh parameters of the process, none where it is not learned."""
    return processes.init_monotone(key) if self.learnable else {}

  def bind(self, params: Params) -> 'NoiseSchedule':
    """Return the schedule whose process has these parameters."""
    if not self.learnable:
      return self
    bound = copy.copy(self)
    bound.process = processes.learned(params, *-processes.log_snr(self.process, jnp.arange(2.0)))
    return bound

  @property
  def zero_terminal(self) -> bool:
    """True if the last level holds no signal."""
    return bool(tabulate(self.process, np.ones(1))[0] == 0)

  def smooth_process(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Levels of training from t = 0 to 1, smooth in t, for integration over them."""
    return self.process(self.t_min + (1 - self.t_min) * t)

  def levels(self, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """(alphas [T], sigmas [T]), data to noise, float64: the table, or `count` even times."""
    return tabulate(self.process, np.linspace(self.t_min, 1, count))

  def at(self, t: PerExample) -> Level:
    """Return the levels at times t [b] in [0, 1) of the range of training."""
    alpha, sigma = self.smooth_process(t)
    return Level(alpha, sigma, self.label(alpha, sigma), t)

  def time_of(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The time of `smooth_process` in [0, 1] with, or nearest to, this sigma / alpha."""

    def halve(_, ends):  # The ratio grows with t.
      low, high = ends
      middle = (low + high) / 2
      there = self.smooth_process(middle)
      below = there[1] * alpha < sigma * there[0]
      return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(sigma), jnp.ones_like(sigma)))
    return (low + high) / 2

  def at_ratio(self, ratio: PerExample) -> Level:
    """Return the levels of, or nearest to, sigma / alpha = ratio [b], within those of training."""
    return self.at(self.time_of(jnp.ones_like(ratio), ratio))

  def after(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pair (alpha, sigma) after that fraction of the times from noise to data."""
    return tabulate(self.process, np.asarray(max(1 - fraction, 0.0)))

  def label(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return the label of any pair, of alpha's shape, within `label_range`."""
    if self.kind == 'sigma':
      return self.timesteps * sigma
    label = noise_label(alpha, sigma)
    return label if self.kind == 'log_snr' else self.timesteps * (label / 5 + 0.5)

  def at_label(self, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair of a label of a table, or of kind log_snr; of norm 1 unless alpha stays 1."""
    ratio = jnp.exp(4 * label)
    explodes = self.process(jnp.ones(()))[0] == 1
    alpha = jnp.where(explodes, 1.0, 1 / jnp.sqrt(1 + ratio**2))
    return alpha, ratio * alpha

  def label_as(self, how: str, grid: Grid) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return `label` in one of the ways LABELS, of which 'exact' alone is in continuous time."""
    if how != 'exact':
      raise UserError(f'timesteps {how!r} are of a table; choose exact for a process.')
    return self.label

  def grid(
    self, steps: int, spacing: str | Sequence[float] = 'trailing', rho: float | None = None,
    **places,
  ) -> Grid:
    """Return a sampler's grid; `places`, of a table alone, are more of `sampling_grid`'s."""
    for name, value in places.items():
      if value != _PLACES.get(name):
        raise UserError(f'{name} places timesteps of a table; leave it out for a process.')
    return process_grid(self.process, steps, spacing, rho, first_time=self.t_min)


_PLACES = {'steps_offset': 0, 'drop_last': False, 'fractional': False, 'set_alpha_to_one': True}
"""Arguments of `sampling_grid` that say nothing at these values."""


class Schedule(NoiseSchedule):
  """A table: alpha_t and sigma_t for the timesteps t = 0 .. T-1, growing towards noise.

  Calls map integer timesteps [b] to (alpha [b], sigma [b]), float32 (float64 in x64 mode). alphas,
  sigmas: [T] float64.
  """

  def __init__(self, config: ScheduleConfig):
    self.config = config
    self.alphas, self.sigmas = config.table()
    self.kind, self.timesteps = getattr(config, 'label', 'timestep'), len(self)
    self.t_min, self.label_range = 1 / len(self), float(len(self))

  @property
  def table(self) -> 'Schedule':
    return self

  @property
  def alpha_bar(self) -> np.ndarray:
    """alpha_t^2 [T], the running products of 1 - beta."""
    return self.alphas**2

  @property
  def zero_terminal(self) -> bool:
    return bool(self.alphas[-1] == 0)

  @property
  def variance_preserving(self) -> bool:
    """True if alpha^2 + sigma^2 = 1 at every step."""
    return np.allclose(self.alphas**2 + self.sigmas**2, 1, rtol=0, atol=1e-9)

  def __len__(self) -> int:
    return len(self.alphas)

  def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.alphas)[t], jnp.asarray(self.sigmas)[t]

  def process(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The table as a process: t [...] in [0, 1] -> (alpha [...], sigma [...]).

    Linear between neighbours, on the unit circle for a variance-preserving table; exact at t = (i +
    1) / T, and (1, 0) at t = 0.
    """
    t = jnp.asarray(t)
    knots = np.arange(len(self) + 1) / len(self)
    place = lambda first, values: jnp.interp(
      t, jnp.asarray(knots, t.dtype), jnp.asarray(np.append(first, values), t.dtype)
    )
    alpha, sigma = place(1.0, self.alphas), place(0.0, self.sigmas)
    if self.variance_preserving:
      norm = jnp.sqrt(alpha**2 + sigma**2)
      alpha, sigma = alpha / norm, sigma / norm
    return alpha, sigma

  def smooth_process(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From the table's first level at t = 0 to its last at t = 1.

    Without `process`'s kinks, at which solvers lose their order: for a variance-preserving table
    `processes.arc`, the same levels at an even pace.
    """
    if self.variance_preserving:
      return processes.arc(*((self.alphas[i], self.sigmas[i]) for i in (0, -1)))(t)
    return super().smooth_process(t)

  def levels(self, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    return self.alphas, self.sigmas

  def after(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The pair of the timestep that is left, rounded as diffusers does."""
    place = min(round(len(self) - fraction * len(self)), len(self) - 1)
    return self.alphas[place], self.sigmas[place]

  def at_timestep(self, t: jax.Array) -> Level:
    """Return the levels of integer timesteps t [b]."""
    alpha, sigma = self(t)
    label = sigma * len(self) if self.kind == 'sigma' else t
    return Level(alpha, sigma, label, t / len(self))

  def at(self, t: PerExample) -> Level:
    return self.at_timestep(jnp.clip(jnp.floor(t * len(self)).astype(int), 0, len(self) - 1))

  def at_ratio(self, ratio: PerExample) -> Level:
    return self.at_timestep(jnp.round(self.place(jnp.ones_like(ratio), ratio)).astype(int))

  def label(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    return sigma * len(self) if self.kind == 'sigma' else self.place(alpha, sigma)

  def place(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The (fractional) timestep at which the schedule has this sigma / alpha.

    Interpolated in ln(sigma / alpha), as in diffusers, and before a last step of alpha = 0 in the
    angle atan2(sigma, alpha).
    """
    steps = jnp.arange(len(self))
    at = lambda x, knots: jnp.interp(x, jnp.asarray(knots, x.dtype), steps.astype(x.dtype))
    level = log_level(jnp.asarray(alpha), jnp.asarray(sigma))
    t = at(level, log_level(self.alphas, self.sigmas, np))
    if not self.zero_terminal:
      return t
    angle, angles = jnp.arctan2(sigma, alpha), np.arctan2(self.sigmas, self.alphas)
    return jnp.where(angle > angles[-2], at(angle, angles), t)

  def at_label(self, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    if self.kind == 'sigma':
      return 1 - label / len(self), label / len(self)
    return self.process((label + 1) / len(self))

  def label_as(self, how: str, grid: Grid) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Labels as in `NoiseSchedule`; rounded for the grid's levels, others keep their fraction."""
    if how == 'exact':
      return self.label
    if how == 'sigma':
      return lambda alpha, sigma: sigma * len(self)

    def rounded(alpha, sigma):
      t = self.place(alpha, sigma)
      known = ((grid[0] == alpha) & (grid[1] == sigma)).any()
      return jnp.where(known, jnp.round(t) if how == 'nearest' else jnp.floor(t + 1e-3), t)

    return rounded

  grid = sampling_grid
