"""Metrics between two log lines: sums on the device, speed and waiting time on the host."""

import jax

from diffusion_jax.train.goodput import Goodput
from diffusion_jax.train.tasks.task import Metrics, averages, combine


class Meter:
  """Adds up metrics without waiting for the device.

  `close_window` hands over the sums; `read` turns them into numbers and is called one step later,
  when the device is done with them and busy with the next step. Speeds are those of training
  alone: drawing, scoring and saving, which `goodput` knows of, do not count.
  """

  def __init__(self, batch_size: int, goodput: Goodput, totals: Metrics | None = None):
    self._batch_size, self._goodput = batch_size, goodput
    self._totals = totals or {}
    self._combine = jax.jit(combine)
    self._begin()

  def _begin(self) -> None:
    self._steps, self._before = 0, self._goodput.totals()

  def add(self, metrics: Metrics) -> None:
    """The metrics of one more step."""
    self._totals = self._combine(self._totals, metrics) if self._totals else metrics
    self._steps += 1

  @property
  def totals(self) -> Metrics:
    """Sums since the last log line, for the checkpoint."""
    return self._totals

  def close_window(self) -> tuple[Metrics, dict[str, float]]:
    """(sums, speed) since the last call; starts the next window."""
    now = self._goodput.totals()
    waited = now['data'] - self._before['data']
    seconds = max(now['step'] - self._before['step'] + waited, 1e-9)
    speed = {
      'images_per_second': self._steps * self._batch_size / seconds,
      'seconds_per_step': seconds / max(self._steps, 1),
      'data_wait_fraction': waited / seconds,
      'goodput': self._goodput.fraction(),
    }
    totals, self._totals = self._totals, {}
    self._begin()
    return totals, speed

  @staticmethod
  def read(totals: Metrics) -> dict:
    """Sums -> means on the host."""
    return averages(jax.device_get(totals))
