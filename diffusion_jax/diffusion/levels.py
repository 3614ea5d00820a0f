"""Noise levels that a network is trained at: those of a table of timesteps, or of a process."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion import timesteps
from diffusion_jax.diffusion.denoiser import noise_label
from diffusion_jax.diffusion.processes import Process
from diffusion_jax.diffusion.schedules import Schedule
from diffusion_jax.types import PerExample


class Level(NamedTuple):
  """One noise level an example, each [b].

  alpha, sigma: x = alpha x_0 + sigma eps. label: what the network is told. position: in [0, 1),
  growing with the noise.
  """

  alpha: PerExample
  sigma: PerExample
  label: PerExample
  position: PerExample


class Levels(Protocol):
  """Where an `Objective` finds its noise levels."""

  process: Process
  """t in [0, 1] -> (alpha, sigma)."""
  t_min: float
  """The earliest time at which the network is trained."""

  def at(self, t: PerExample) -> Level:
    """The levels at times t [b] in [0, 1)."""

  def at_ratio(self, ratio: PerExample) -> Level:
    """The levels of, or nearest to, sigma / alpha = ratio [b]."""

  def label(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """What the network is told at any pair, as samplers ask for."""


class TableLevels:
  """The T levels of a schedule; networks are told the timestep."""

  def __init__(self, schedule: Schedule):
    self.schedule = schedule
    self.process = schedule.process
    self.t_min = 1 / len(schedule)

  def at_timestep(self, t: jax.Array) -> Level:
    """The levels of integer timesteps t [b] in [0, T)."""
    return Level(*self.schedule(t), t, t / len(self.schedule))

  def at(self, t: PerExample) -> Level:
    return self.at_timestep(timesteps.timestep(t, len(self.schedule)))

  def at_ratio(self, ratio: PerExample) -> Level:
    nearest = jnp.round(self.schedule.timestep(jnp.ones_like(ratio), ratio)).astype(int)
    return self.at_timestep(nearest)

  def label(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    return self.schedule.timestep(alpha, sigma)


class ContinuousLevels:
  """All levels of a process from t_min on; networks are told ln(sigma / alpha) / 4."""

  def __init__(self, process: Process, t_min: float = 1e-3):
    self.process, self.t_min = process, t_min

  def _level(self, alpha, sigma, position) -> Level:
    return Level(alpha, sigma, noise_label(alpha, sigma), position)

  def at(self, t: PerExample) -> Level:
    return self._level(*self.process(self.t_min + (1 - self.t_min) * t), t)

  def at_ratio(self, ratio: PerExample) -> Level:
    """Beyond the ends of a process the level of the end; found by bisection, as the ratio grows."""

    def halve(_, ends):
      low, high = ends
      middle = (low + high) / 2
      alpha, sigma = self.process(self.t_min + (1 - self.t_min) * middle)
      below = sigma < ratio * alpha
      return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(
      0, 30, halve, (jnp.zeros_like(ratio), jnp.ones_like(ratio))
    )
    return self.at((low + high) / 2)

  def label(self, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    return noise_label(alpha, sigma)
