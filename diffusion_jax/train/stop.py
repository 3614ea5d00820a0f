"""Ctrl-C and SIGTERM as a polite request: finish the step, save, leave."""

import signal


class StopRequest:
  """While entered, the first SIGINT or SIGTERM only sets `signal`; a second one interrupts."""

  def __init__(self):
    self.signal: int | None = None
    self._previous = {}

  def __enter__(self) -> 'StopRequest':
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame) -> None:
    if self.signal is not None:
      raise KeyboardInterrupt
    self.signal = number

  def agreed(self) -> bool:
    """Whether any process was asked to stop; all processes get the same answer."""
    import jax

    if jax.process_count() == 1:
      return self.signal is not None
    import numpy as np
    from jax.experimental import multihost_utils

    asked = multihost_utils.process_allgather(np.asarray(self.signal is not None))
    return bool(asked.any())
