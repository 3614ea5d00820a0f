"""Noise schedules: signal alpha_t and noise sigma_t of x_t = alpha_t x_0 + sigma_t eps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.errors import UserError

Grid = tuple[Float[Array, 'n'], Float[Array, 'n']]
"""(alphas, sigmas) from noise to data; the last pair is (1, 0)."""


def linear_betas(steps: int, start: float, end: float) -> np.ndarray:
  """beta_t linear in t; DDPM (Ho et al. 2020, section 4) uses 1e-4 to 0.02 with 1000 steps."""
  return np.linspace(start, end, steps, dtype=np.float64)


def scaled_linear_betas(steps: int, start: float, end: float) -> np.ndarray:
  """sqrt(beta_t) linear in t; Stable Diffusion uses 0.00085 to 0.012 with 1000 steps."""
  return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def cosine_betas(steps: int, start: float = 0.0, end: float = 0.999) -> np.ndarray:
  """Nichol & Dhariwal 2021, eq. 17 with s = 0.008; betas capped at `end`. `start` is not used."""
  del start

  def alpha_bar(t):
    return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

  t = np.arange(steps + 1, dtype=np.float64) / steps
  return np.minimum(1 - alpha_bar(t[1:]) / alpha_bar(t[:-1]), end)


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
  'linear': linear_betas,
  'scaled_linear': scaled_linear_betas,
  'cosine': cosine_betas,
}


def zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alpha_bar): the last step is pure noise (Lin et al. 2024, alg. 1).

  Args:
    alpha_bar: [T] decreasing products of (1 - beta), float64.
  """
  root = np.sqrt(alpha_bar)
  return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """A discrete variance-preserving schedule of `steps` timesteps; names follow scheduler_config."""

  beta_schedule: str = 'scaled_linear'
  beta_start: float = 0.00085
  beta_end: float = 0.012
  num_train_timesteps: int = 1000
  rescale_betas_zero_snr: bool = False

  def __post_init__(self):
    if self.beta_schedule not in BETAS:
      raise UserError(
        f'schedule.beta_schedule is {self.beta_schedule!r}; choose one of {", ".join(BETAS)}.'
      )
    if self.num_train_timesteps < 2:
      raise UserError('schedule.num_train_timesteps must be at least 2.')


class Schedule:
  """alpha_t and sigma_t, t = 0 .. T-1, with alpha_t^2 + sigma_t^2 = 1.

  Calling it with integer timesteps [b] gives (alpha [b], sigma [b]), float32.
  """

  def __init__(self, config: ScheduleConfig):
    betas = BETAS[config.beta_schedule](
      config.num_train_timesteps, config.beta_start, config.beta_end
    )
    alpha_bar = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:
      alpha_bar = zero_terminal_snr(alpha_bar)
    self.config = config
    self.alpha_bar = alpha_bar
    self.alphas = np.sqrt(alpha_bar).astype(np.float32)
    self.sigmas = np.sqrt(1 - alpha_bar).astype(np.float32)

  def __len__(self) -> int:
    return len(self.alpha_bar)

  def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.alphas)[t], jnp.asarray(self.sigmas)[t]

  def timestep(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The (fractional) timestep at which the schedule has this alpha and sigma.

    Interpolates in the angle atan2(sigma, alpha), which stays finite at zero terminal SNR.
    """
    angles = np.arctan2(np.sqrt(1 - self.alpha_bar), np.sqrt(self.alpha_bar)).astype(np.float32)
    return jnp.interp(jnp.arctan2(sigma, alpha), angles, np.arange(len(self), dtype=np.float32))


def spaced_timesteps(total: int, count: int, spacing: str) -> np.ndarray:
  """`count` integer timesteps from high to low (Lin et al. 2024, table 2).

  'trailing' always contains T-1, 'leading' always 0, 'linspace' both ends.

  Raises:
    UserError: for an unknown spacing, or a count outside [1, total].
  """
  if not 1 <= count <= total:
    raise UserError(f'{count} sampling steps do not fit the schedule; choose 1 to {total}.')
  if spacing == 'trailing':
    steps = np.round(np.arange(total, 0, -total / count)).astype(np.int64) - 1
  elif spacing == 'leading':
    steps = (np.arange(count) * (total // count)).astype(np.int64)[::-1]
  elif spacing == 'linspace':
    steps = np.round(np.linspace(total - 1, 0, count)).astype(np.int64)
  else:
    raise UserError(f'step spacing {spacing!r} is unknown; choose trailing, leading or linspace.')
  return steps[:count].copy()


def sampling_grid(schedule: Schedule, count: int, spacing: str = 'trailing') -> Grid:
  """(alphas [count+1], sigmas [count+1]) from noise to data, ended by the clean pair (1, 0)."""
  steps = spaced_timesteps(len(schedule), count, spacing)
  alphas = np.append(schedule.alphas[steps], np.float32(1))
  sigmas = np.append(schedule.sigmas[steps], np.float32(0))
  return jnp.asarray(alphas), jnp.asarray(sigmas)
