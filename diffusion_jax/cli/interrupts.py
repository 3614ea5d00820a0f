"""Ctrl-C as one sentence, also while modules are imported."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

CODE = 128 + signal.SIGINT
IMPORTING = '<frozen importlib._bootstrap>'


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
  """Let Ctrl-C raise KeyboardInterrupt within, and end the process within an import.

  There nothing has been begun, and anything may become of an exception: an extension module that
  is interrupted while it starts prints it and raises another. A signal that is ignored, as in the
  background of a shell script, stays ignored. Enter it within the `try` that sees to the exception.
  """
  ours = False
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):  # Only the main thread may; Ctrl-C reaches no other.
      signal.signal(signal.SIGINT, _handle)
      ours = True
      # One that came while the program was started again (`host_memory`) is seen here.
      signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    if ours:
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
