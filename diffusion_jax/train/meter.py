"""Metrics that add up, and what the train loop makes of them between two log lines."""

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

from diffusion_jax.train.goodput import Goodput

Metrics = dict[str, Average]
"""Totals and counts by name; merged over microbatches and steps, they keep means exact."""


def mean_metric(values: jax.Array) -> Average:
  """Return the average of a scalar or of one value per example, of which none is left out."""
  return Average(values.sum(), jnp.asarray(values.size, jnp.float32))


def combine(totals: Metrics, new: Metrics) -> Metrics:
  """Merge two dictionaries with the same names; an empty one is neutral."""
  return {name: total.merge(new[name]) for name, total in totals.items()} if totals else new


def averages(metrics: Metrics) -> dict[str, float | list[float | None]]:
  """Totals and counts on the host -> means; vectors become lists with None where nothing fell."""
  out = {}
  with np.errstate(divide='ignore', invalid='ignore'):
    for name, average in jax.tree.map(lambda x: np.asarray(x, np.float64), metrics).items():
      mean = np.where(average.count > 0, average.compute(), np.nan)
      out[name] = (
        float(mean) if not mean.ndim else [None if np.isnan(m) else float(m) for m in mean]
      )
  return out


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
