"""Ctrl-C as one sentence, also while modules are imported."""

import os
import signal
import sys
from types import FrameType

CODE = 128 + signal.SIGINT
IMPORTING = '<frozen importlib._bootstrap>'


class Interrupts:
  """While entered, Ctrl-C raises KeyboardInterrupt, and ends the process within an import.

  There nothing has been begun, and anything may become of an exception: an extension module that
  is interrupted while it starts prints it and raises another. A signal that is ignored, as in the
  background of a shell script, stays ignored.
  """

  def __init__(self):
    self._ours = False

  def __enter__(self) -> 'Interrupts':
    # Entered within the `try` that sees to KeyboardInterrupt.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
      try:
        signal.signal(signal.SIGINT, _handle)
        self._ours = True
        # One that came while the program was started again (`host_memory`) is seen here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
      except ValueError:  # Only the main thread may; Ctrl-C reaches no other.
        pass
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if self._ours:
      signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle(number: int, frame: FrameType | None) -> None:
  while frame is not None:
    if frame.f_code.co_filename == IMPORTING:
      say_interrupted()
      sys.stderr.flush()
      os._exit(CODE)
    frame = frame.f_back
  raise KeyboardInterrupt


def say_interrupted(command: str = '') -> int:
  """Say so; return the exit code."""
  print(f'diffusion_jax{command and " "}{command}: interrupted', file=sys.stderr)
  return CODE
