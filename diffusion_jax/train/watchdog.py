"""Notices that nothing moves any more, and ends the process instead of burning its machine's time.

A hanging collective, file system or data source waits for ever in silence. The stacks say where.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import jax

GRACE_SECONDS = 30.0
"""Until the second line of defence acts, which needs no interpreter."""
_STDERR = 2  # The file itself, whatever stands in for sys.stderr.


class Watchdog:
  """A thread that waits for signs of life.

  When none comes in time it writes the stacks of all threads to stderr and to
  `directory`/stacks_PROCESS.txt, calls `on_stall` with a sentence, and leaves at once. Where the
  interpreter itself stands still (a library that never gives back its lock), faulthandler's own
  thread writes the stacks and leaves, with exit code 1.

  Args:
    seconds: without a beat for so long, the process is stalled; 0 never.
    exit_code: what the process leaves with.
  """

  def __init__(
    self, seconds: float, *, directory: Path, on_stall: Callable[[str], None], exit_code: int
  ):
    self._seconds = self._usual = seconds
    self._directory, self._on_stall, self._exit_code = directory, on_stall, exit_code
    self._what = 'step'
    self._closed = threading.Event()
    self._stacks = None
    self.beat()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._thread.start()

  def beat(self) -> None:
    """A sign of life."""
    self._last = time.monotonic()

  @contextlib.contextmanager
  def allow(self, seconds: float, what: str) -> Iterator[None]:
    """Within, a beat is due every `seconds`; 0 for no limit. `what` names the work."""
    before = (self._seconds, self._what)
    self.beat()
    self._seconds, self._what = seconds, what
    try:
      yield
    finally:
      self.beat()
      self._seconds, self._what = before

  def close(self) -> None:
    """Stops watching."""
    self._closed.set()
    self._thread.join()
    if self._stacks is not None:
      faulthandler.cancel_dump_traceback_later()
      if self._stacks is not _STDERR:
        self._stacks.close()
        with contextlib.suppress(OSError):  # The directory may be gone, or be read-only by now.
          if not self._file().stat().st_size:
            self._file().unlink()

  def _watch(self) -> None:
    wait = 1.0
    while not self._closed.wait(wait):
      limit, what, silent = self._seconds, self._what, time.monotonic() - self._last
      wait = min(max(limit / 20, 0.05), 5.0) if limit else 1.0
      self._arm(limit)
      if limit and silent > limit:
        self._stall(f'no {what} has been finished for {silent:.0f} s')

  def _arm(self, limit: float) -> None:
    """Puts off faulthandler, which acts when even this thread runs no more."""
    if not limit:
      if self._stacks is not None:
        faulthandler.cancel_dump_traceback_later()
      return
    if self._stacks is None:
      self._stacks = self._open()
    faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=self._stacks)

  def _open(self) -> IO[str] | int:
    """The file, or stderr where there can be none: this thread must not die of a full disk."""
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      return self._file().open('w', encoding='utf-8')
    except OSError:
      return _STDERR

  def _file(self) -> Path:
    return self._directory / f'stacks_{jax.process_index()}.txt'

  def _stall(self, sentence: str) -> None:
    faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True, file=self._stacks)
    with contextlib.suppress(OSError, ValueError):  # stderr may be on the same full disk.
      print(f'diffusion_jax: {sentence}; the stacks of all threads follow', file=sys.stderr)
      sys.stderr.flush()
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    if self._stacks is not _STDERR:
      faulthandler.dump_traceback(file=self._stacks, all_threads=True)
    try:
      self._on_stall(f'{sentence}; where, is in {self._file()}')
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(self._exit_code)
