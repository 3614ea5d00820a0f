"""What is said goes on where it can: a log file on a full disk must not end what it tells of."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Tolerant:
  """A text stream whose errors of storage are swallowed, with what it could not write."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def writelines(self, lines: Any) -> None:
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
  """Within, nothing that is printed raises for want of room, or because nobody listens any more."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = map(_Tolerant, before)
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before
    for stream in before:
      _drop_what_cannot_be_written(stream)


def _drop_what_cannot_be_written(stream: Any) -> None:
  """Else Python would try once more when it ends, and leave with code 120."""
  try:
    stream.flush()
  except ValueError:  # It is closed.
    return
  except OSError:
    with contextlib.suppress(OSError, io.UnsupportedOperation):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())
      os.close(nowhere)
