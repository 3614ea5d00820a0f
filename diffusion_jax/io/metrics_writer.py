"""Metrics of a run on their way to every back-end, none of which can slow or stop training."""

import collections
import contextlib
import json
import sys
import threading
import time
from typing import Any

import numpy as np

from diffusion_jax.io.metrics_backends import (
  Backend,
  JsonLines,
  Record,
  TensorBoard,
  WeightsAndBiases,
)
from diffusion_jax.io.run_directory import RunDirectory

_MOST_RECORDS, _MOST_IMAGES = 10_000, 8
"""Kept in memory for a back-end that is slow or away."""


class MetricsWriter:
  """metrics.jsonl, TensorBoard if tensorboardX is there, and wandb if asked for; on process 0.

  Each has a thread of its own. One that fails is switched off with a line on stderr and tried again
  later; what it has missed is kept for it, within bounds. `write` never waits and never raises for
  the sake of a back-end.

  Args:
    active: False on all other processes, where nothing is written.
    wandb_project: name of the project, or '' for none.
    config: of the run, for wandb.
    retry_seconds: until a back-end that has failed is tried again.
  """

  def __init__(
    self,
    run: RunDirectory,
    active: bool,
    *,
    wandb_project: str = '',
    config: dict[str, Any] | None = None,
    retry_seconds: float = 300.0,
  ):
    backends: list[Backend] = []
    if active:
      backends.append(JsonLines(run.metrics))
      try:
        backends.append(TensorBoard(run.tensorboard))
      except ImportError:
        _say('TensorBoard events are not written; for them, pip install tensorboardX.')
      if wandb_project:
        backends.append(WeightsAndBiases(run, wandb_project, config or {}))
    self._workers = [_Worker(backend, retry_seconds) for backend in backends]

  @property
  def trouble(self) -> list[str]:
    """A sentence for each back-end that is switched off or has lost something."""
    return [worker.trouble for worker in self._workers if worker.trouble]

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """One line of numbers (lists and None allowed), and every plain number as an event."""
    if not self._workers:
      return
    line = json.dumps({'kind': kind, 'step': step, **_finite(values)})
    numbers = {
      f'{kind}/{name}': value for name, value in values.items()
      if isinstance(value, (int, float)) and np.isfinite(value)
    }
    self._put(Record(step, time.time(), line, numbers))

  def image(self, name: str, step: int, image: np.ndarray) -> None:
    """uint8 [h w 3] as an event."""
    self._put(Record(step, time.time(), name=name, image=image))

  def _put(self, record: Record) -> None:
    for worker in self._workers:
      worker.put(record)

  def flush(self, timeout: float = 10.0) -> None:
    """Waits until all is written, save by back-ends that are switched off, or time is up."""
    end = time.monotonic() + timeout
    for worker in self._workers:
      worker.wait(end - time.monotonic())

  def close(self, timeout: float = 60.0) -> None:
    """Tries once more to write what is left, and leaves behind what does not finish in time."""
    end = time.monotonic() + timeout
    for worker in self._workers:
      worker.finish()
    for worker in self._workers:
      worker.join(max(end - time.monotonic(), 0.0))
      if worker.is_alive():
        _say(f'{worker.name} did not finish within {timeout:g} s and is left behind.')
    self._workers = []


class _Worker(threading.Thread):
  """Hands records to one back-end, in order."""

  def __init__(self, backend: Backend, retry_seconds: float):
    super().__init__(name=backend.name, daemon=True)
    self._backend, self._retry_seconds = backend, retry_seconds
    self._records: collections.deque[Record] = collections.deque()
    self._changed = threading.Condition()
    self._open = self._closing = self._busy = False
    self._error, self._retry_at, self._lost = '', 0.0, 0
    self.start()

  @property
  def trouble(self) -> str:
    """What is wrong with the back-end, if anything."""
    lost = f'{self._lost} records lost' if self._lost else ''
    return ': '.join([self.name, *filter(None, (self._error, lost))]) if self._error or lost else ''

  def put(self, record: Record) -> None:
    """Leaves the record to the thread."""
    with self._changed:
      self._records.append(record)
      self._keep_within_bounds()
      self._changed.notify_all()

  def _keep_within_bounds(self) -> None:
    too_old = None
    if self._records[-1].image is not None:
      images = [i for i, record in enumerate(self._records) if record.image is not None]
      too_old = images[0] if len(images) > _MOST_IMAGES else None
    if too_old is None and len(self._records) > _MOST_RECORDS:
      too_old = 0
    if too_old is not None:
      del self._records[too_old]
      self._lost += 1

  def wait(self, timeout: float) -> None:
    """Until nothing is left to write or the back-end is switched off."""
    with self._changed:
      self._changed.wait_for(
        lambda: self._error or not (self._records or self._busy), max(timeout, 0.0)
      )

  def finish(self) -> None:
    """Makes the thread end when it has tried to write what is left."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()

  def run(self) -> None:
    while (record := self._next()) is not None:
      try:
        if not self._open:
          self._backend.open()
          self._open = True
        self._backend.write(record)
      except (Exception, SystemExit) as error:
        self._failed(record, error)
      else:
        self._done()
    self._close()

  def _next(self) -> Record | None:
    """The next record when it is time for it; None at the end."""
    with self._changed:
      while True:
        wait = self._retry_at - time.monotonic()
        if self._closing and (not self._records or self._retry_at == float('inf')):
          return None
        if self._records and (wait <= 0 or self._closing):
          self._busy = True
          return self._records.popleft()
        self._changed.wait(wait if self._records else None)

  def _failed(self, record: Record, error: BaseException) -> None:
    self._close()
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    with self._changed:
      first, self._error, self._busy = not self._error, reason, False
      self._records.appendleft(record)
      # One more try at the end, no more.
      self._retry_at = float('inf') if self._closing else time.monotonic() + self._retry_seconds
      self._changed.notify_all()
    if first:
      _say(f'{self.name} is switched off ({reason}); trying again in {self._retry_seconds:g} s.')

  def _done(self) -> None:
    with self._changed:
      back, self._error, self._busy = bool(self._error), '', False
      self._changed.notify_all()
    if back:
      _say(f'{self.name} is back.')

  def _close(self) -> None:
    self._open = False
    with contextlib.suppress(Exception, SystemExit):  # What is unwritten is still in our hands.
      self._backend.close()


def _say(text: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # stderr may be on the same full disk.
    print(f'metrics: {text}', file=sys.stderr, flush=True)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  """NaN and infinity are no JSON; they become None."""
  clean = lambda v: None if isinstance(v, float) and not np.isfinite(v) else v
  return {k: [clean(x) for x in v] if isinstance(v, list) else clean(v) for k, v in values.items()}
