"""Signs of life from long work, so that whoever waits for it can tell work from standing still.

Loops over batches, wherever they are, call `beat` after each. Training listens while it saves,
draws and scores: it feeds its watchdog and may stop between two batches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[], None] | None] = ContextVar('listener', default=None)


def beat() -> None:
  """One piece of work is done. Whoever listens may raise here, to stop the work."""
  if (listener := _listener.get()) is not None:
    listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
  """Calls `listener` at every beat within."""
  token = _listener.set(listener)
  try:
    yield
  finally:
    _listener.reset(token)
