"""Traces of a few steps, chosen beforehand or asked for by a signal while a run goes on."""

import signal
import threading
from pathlib import Path

import jax

from diffusion_jax.files import first_line, say


class ProfilerWindow:
  """Traces of steps by jax.profiler in `directory`/step_N, N being the steps done before.

  For TensorBoard's profile plugin and xprof; of several processes in folders process_I. A failed
  trace costs a line on stderr, never the run. SIGUSR1 opens a window in its process. first_step:
  steps done before the window opens by itself; 0 for none. steps: length of a window.
  """

  def __init__(self, directory: Path, first_step: int, steps: int):
    self._directory, self._first_step, self._steps = Path(directory), first_step, steps
    self._asked = self._unwritten = False
    self._end: int | None = None
    # Only the main thread may.
    self._listens = threading.current_thread() is threading.main_thread()
    if self._listens:
      self._before = signal.signal(signal.SIGUSR1, self._ask)

  def _ask(self, number: int, frame) -> None:
    self._asked = True

  def before(self, step: int) -> None:
    """Open or end a window; to be called before each step, with the number of steps done."""
    if self._end is not None and step >= self._end:
      self._stop()
    if self._end is None and (self._asked or step == self._first_step > 0):
      self._asked = False
      self._start(step)

  def close(self) -> None:
    """End a window that is open, and listen no more."""
    if self._end is not None:
      self._stop()
    if self._listens:
      signal.signal(signal.SIGUSR1, self._before)
      self._listens = False

  def _start(self, step: int) -> None:
    folder = self._directory / f'step_{step}'
    if jax.process_count() > 1:
      folder = folder / f'process_{jax.process_index()}'
    try:
      _wait_for_devices()
      if self._unwritten:  # JAX starts no other before it has ended the last; its content is gone.
        jax.profiler.stop_trace()
        self._unwritten = False
      jax.profiler.start_trace(str(folder))
    except Exception as error:  # Another trace, a full disk, a driver: no reason to stop training.
      say(f'no trace from step {step} on ({first_line(error)})', 'profiler: ')
      return
    self._end = step + self._steps
    say(f'tracing {self._steps} steps from step {step} on into {folder}', 'profiler: ')

  def _stop(self) -> None:
    self._end = None
    try:
      _wait_for_devices()
      jax.profiler.stop_trace()
    except Exception as error:
      say(f'the trace could not be written ({first_line(error)})', 'profiler: ')
      self._unwritten = True


def _wait_for_devices() -> None:
  """Wait for all devices' queues, by a small last task, so that traces hold complete steps."""
  last = [jax.device_put(0.0, device) + 1 for device in jax.local_devices()]
  jax.block_until_ready(last)
