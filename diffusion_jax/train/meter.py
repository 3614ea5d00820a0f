"""Metrics between two log lines: sums on the device, speed and waiting time on the host."""

import time
from contextlib import contextmanager

import jax

from diffusion_jax.train.tasks.task import Metrics, averages, combine


class Meter:
  """Adds up metrics without waiting for the device.

  `close_window` hands over the sums; `read` turns them into numbers and is called one step later,
  when the device is done with them and busy with the next step.
  """

  def __init__(self, batch_size: int, totals: Metrics | None = None):
    self._batch_size = batch_size
    self._totals = totals or {}
    self._combine = jax.jit(combine)
    self._reset()

  def _reset(self) -> None:
    self._start = time.perf_counter()
    self._steps, self._waited, self._paused = 0, 0.0, 0.0

  def add(self, metrics: Metrics) -> None:
    """The metrics of one more step."""
    self._totals = self._combine(self._totals, metrics) if self._totals else metrics
    self._steps += 1

  @contextmanager
  def waiting(self):
    """Time in which the loop waits for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  @contextmanager
  def paused(self):
    """Time that is not training: drawing, scoring, saving."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  @property
  def totals(self) -> Metrics:
    """Sums since the last log line, for the checkpoint."""
    return self._totals

  def close_window(self) -> tuple[Metrics, dict[str, float]]:
    """(sums, speed) since the last call; starts the next window."""
    seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
    speed = {
      'images_per_second': self._steps * self._batch_size / seconds,
      'seconds_per_step': seconds / max(self._steps, 1),
      'data_wait_fraction': min(self._waited / seconds, 1.0),
    }
    totals, self._totals = self._totals, {}
    self._reset()
    return totals, speed

  @staticmethod
  def read(totals: Metrics) -> dict:
    """Sums -> means on the host."""
    return averages(jax.device_get(totals))
