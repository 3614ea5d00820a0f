"""Metrics that add up, the speed of training, and where the hours of a run go."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

PHASES = ('start', 'compile', 'data', 'step', 'checkpoint', 'evaluation', 'lost', 'down')
"""start: imports, reading, restoring. data: waiting for a batch. lost: work done again, or never,
because a start ended without saving it. down: between one start's last word and the next start."""


class Goodput:
  """Seconds by phase, beginning with 'start'. clock: seconds, growing."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._totals = dict.fromkeys(PHASES, 0.0)
    self._clock, self._phase, self._since = clock, 'start', clock()

  def resume(
    self, saved: dict[str, float] | None, last: dict[str, float] | None, down: float
  ) -> None:
    """Take over the accounts of earlier starts.

    saved: totals in this start's checkpoint, or None. last: totals in the last status of the start
    before; what followed `saved` is lost. down: seconds between that status and this start.
    """
    saved, last = saved or {}, last or {}
    after = sum(last.values()) - sum(saved.values())
    for name, seconds in saved.items():
      self._totals[name] += seconds
    self._totals['lost'] += max(after, 0.0)
    self._totals['down'] += max(down, 0.0)

  def enter(self, phase: str) -> str:
    """Count all that has no phase of its own as `phase` from now on; return what it was before."""
    now, before = self._clock(), self._phase
    self._totals[before] += now - self._since
    self._phase, self._since = phase, now
    return before

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Count what happens within as `name`; of nested phases the inner counts."""
    before = self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def totals(self) -> dict[str, float]:
    """Return seconds by phase up to now."""
    self.enter(self._phase)
    return {name: round(seconds, 6) for name, seconds in self._totals.items()}

  def seconds(self) -> float:
    """Return all of them, without the time between starts."""
    totals = self.totals()
    return sum(totals.values()) - totals['down']

  def fraction(self) -> float:
    """Return the fraction of all time that went into steps whose results were kept."""
    totals = self.totals()
    return totals['step'] / max(sum(totals.values()), 1e-9)


Metrics = dict[str, Average]
"""Totals and counts by name; merged over microbatches and steps, they keep means exact."""


def mean_metric(values: jax.Array) -> Average:
  """Return the average of a scalar or of one value per example, of which none is left out."""
  return Average(values.sum(), jnp.asarray(values.size, jnp.float32))


def combine(totals: Metrics, new: Metrics) -> Metrics:
  """Merge two dictionaries with the same names; an empty one is neutral."""
  return {name: total.merge(new[name]) for name, total in totals.items()} if totals else new


def averages(metrics: Metrics) -> dict[str, float | list[float | None]]:
  """Return the means of totals on the host; vectors as lists, with None where nothing fell."""
  out = {}
  with np.errstate(divide='ignore', invalid='ignore'):
    for name, average in jax.tree.map(lambda x: np.asarray(x, np.float64), metrics).items():
      mean = np.where(average.count > 0, average.compute(), np.nan)
      out[name] = (
        float(mean) if not mean.ndim else [None if np.isnan(m) else float(m) for m in mean]
      )
  return out


class Meter:
  """Sums of metrics, without waiting for the device.

  `close_window` hands over the sums; `read`, one step later, makes numbers of them while the device
  is busy. Speeds are those of training alone, without sampling, scoring and saving (`goodput`).
  totals: sums since the last log line, for the checkpoint.
  """

  def __init__(self, batch_size: int, goodput: Goodput, totals: Metrics | None = None):
    self._batch_size, self._goodput = batch_size, goodput
    self.totals = totals or {}
    self._combine = jax.jit(combine)
    self._begin()

  def _begin(self) -> None:
    self._steps, self._before = 0, self._goodput.totals()

  def add(self, metrics: Metrics) -> None:
    """Add the metrics of one more step."""
    self.totals = self._combine(self.totals, metrics) if self.totals else metrics
    self._steps += 1

  def close_window(self) -> tuple[Metrics, dict[str, float]]:
    """Return (sums, speed) since the last call, and start the next window."""
    now = self._goodput.totals()
    waited = now['data'] - self._before['data']
    seconds = max(now['step'] - self._before['step'] + waited, 1e-9)
    speed = {
      'images_per_second': self._steps * self._batch_size / seconds,
      'seconds_per_step': seconds / max(self._steps, 1),
      'data_wait_fraction': waited / seconds,
      'goodput': self._goodput.fraction(),
    }
    totals, self.totals = self.totals, {}
    self._begin()
    return totals, speed

  @staticmethod
  def read(totals: Metrics) -> dict:
    """Return the means of sums, on the host."""
    return averages(jax.device_get(totals))
