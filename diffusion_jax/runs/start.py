"""One start of a run, from before anything heavy is imported to its last word."""

import contextlib
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.files import say, set_aside_damaged, tolerant_streams
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.lock import RunLock
from diffusion_jax.runs.status import NAME, Status


class Start:
  """A context: the lock of a workdir and its status file, 'starting' once taken.

  A start refused by a UserError leaves the workdir as it was: a finished run is still finished.
  Within, printing never raises (`files.tolerant_streams`). status: after `open`. lock: of process
  0; None in others.
  """

  def __init__(self, workdir: str | Path):
    self.directory = RunDirectory(workdir)
    self.status: Status | None = None
    self.lock: RunLock | None = None
    self._refusal: UserError | None = None
    self._made: list[Path] = []
    self._met = self._refused = False
    self._told = 0.0
    self._streams = tolerant_streams()

  def open(self, process: int, processes: int) -> None:
    """Take the lock in process 0. UserError where the workdir cannot be used, or another run is in
    it; with several processes not before `join`."""
    if process == 0:
      try:
        self._take()
      except UserError as error:
        if processes == 1:
          self.close()
          raise
        self._refusal = error
        return
    self.status = Status(self.directory, process, processes)
    if process == 0:
      self.status('starting', **self.status.facts_before())

  def _take(self) -> None:
    path = self.directory.path
    try:
      self._made = _make_folder(path)
      self.lock = RunLock(path, on_lost=self._lost, say=say)
      self.lock.take()
      set_aside_damaged(path / NAME)
    except (FileExistsError, NotADirectoryError) as error:
      raise UserError(f'the workdir {path} is a file; choose a directory.') from error
    except OSError as error:
      raise UserError(
        f'the workdir {path} cannot be written ({error.strerror or error}); see to it that it can, '
        'or choose another.'
      ) from error

  def join(self) -> None:
    """Let all joined processes take part in this start; UserError on all without the lock."""
    if self._met:
      return
    import jax

    from diffusion_jax.parallel.processes import agree, in_step

    if self.status is None and self._refusal is None:
      self.open(jax.process_index(), jax.process_count())
    in_step('lock', self._raise_refusal, (UserError,))
    self.status.start = agree('start', self.status.start)[0]
    self._met = True

  def _raise_refusal(self) -> None:
    if self._refusal is not None:
      raise self._refusal

  def report(self, state: str, *, now: bool = False, **more: Any) -> None:
    """Write how things stand before training begins; without `now` no more than once a second."""
    if self.status is not None and (now or time.monotonic() - self._told > 1):
      self._told = time.monotonic()
      self.status(state, **self.status.facts_before(), **more)

  def end(self, error: BaseException) -> None:
    """Write the last word of a start that an error ends before training has begun."""
    if self.status is None:
      return
    interrupted = isinstance(error, KeyboardInterrupt)
    over = interrupted and self.status.before.get('state') == 'finished'
    if over or isinstance(error, UserError | SystemExit):
      self._refused = True
      self.status.put_back()
      return
    message = 'before training began' if interrupted else f'{type(error).__name__}: {error}'[:500]
    self.status(
      'interrupted' if interrupted else 'failed', everyone=True, message=message,
      **self.status.facts_before(),
    )

  def __enter__(self) -> 'Start':
    self._streams.__enter__()
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      if error is not None:
        self.end(error)
    finally:
      self.close()
      self._streams.__exit__(None, None, None)

  def close(self) -> None:
    """Let the keeper and the lock go, and remove a workdir that was made for nothing."""
    if self.status is not None:
      self.status.close()
    if self.lock is not None:
      self.lock.release()
    if self._refused or self.status is None:
      with contextlib.suppress(OSError):  # Something lies in it.
        for path in self._made:
          path.rmdir()

  def release_at_once(self) -> None:
    """Let the lock go before the process leaves without ending in order; wait for no storage."""
    if self.lock is not None:
      thread = threading.Thread(target=self.lock.release, daemon=True)
      thread.start()
      thread.join(2)

  def _lost(self, sentence: str) -> None:
    """Leave, as another start has the workdir now: every file in it is that one's."""
    if self.status is not None:
      self.status.silence()
    say(f'{sentence}; leaving')
    os._exit(1)


def _make_folder(path: Path) -> list[Path]:
  """Make a folder and those above it; the ones that were not there, the innermost first."""
  missing = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
  path.mkdir(parents=True, exist_ok=True)
  return missing
