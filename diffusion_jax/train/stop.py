"""Ctrl-C and SIGTERM as a polite request: finish the step, save, leave."""

import signal

from diffusion_jax.parallel.peers import Peers


class Stopping(Exception):
  """All processes have agreed to stop here, in the midst of drawing or scoring."""


class StopRequest:
  """While entered, the first SIGINT or SIGTERM only asks to stop; a second one interrupts.

  A request to one process reaches all of them (`parallel.peers`).
  """

  def __init__(self, peers: Peers):
    self.signal: int | None = None
    """The signal that this process got, None where another was asked."""
    self._peers = peers
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
    self._peers.ask_to_stop()

  def agreed(self) -> bool:
    """Whether all processes stop here; each asks as often as the others."""
    return self._peers.poll()

  def check(self) -> None:
    """Raises Stopping where all processes stop."""
    if self.agreed():
      raise Stopping

  def settle(self) -> None:
    """Raises Stopping if any process was asked to stop by now; between two kinds of work."""
    if self._peers.settle():
      raise Stopping
