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
  """Let Ctrl-C raise KeyboardInterrupt within, and end the process during imports.

  An extension module interrupted as it starts may print the exception and raise another. An ignored
  signal, as in the background of a shell script, stays ignored. Enter within the `try` that handles
  it.
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
