"""Signals, lost processes, stalls, leaks and failed side work: no end of training goes unsaid."""

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import jax
from jax import monitoring

from diffusion_jax.config import SafetyConfig
from diffusion_jax.errors import Diverged, UserError
from diffusion_jax.files import first_line, say
from diffusion_jax.parallel.processes import Peers, listening
from diffusion_jax.runs.start import Start

T = TypeVar('T')

TRY_AGAIN = 75
"""Exit code of a process that left because another was lost, because nothing moved any more, or
because the last checkpoint or the model could not be written."""
GRACE_SECONDS = 30.0
"""Until the watchdog's second line of defence acts, which needs no interpreter."""
RETRY_SECONDS = 60.0
_MOST_KEPT = 12
"""Work that is kept to be tried again; each may hold an image of some megabytes."""
_STDERR = 2  # The file itself, whatever stands in for sys.stderr.
_OF_A_PEER = ('gloo', 'nccl', 'connection', 'socket', 'unavailable', 'deadline', 'coordination',
              'aborted', 'heartbeat', 'barrier')


class Stopping(Exception):
  """All processes have agreed to stop here, in the midst of sampling or scoring."""


class StopRequest:
  """A context in which the first SIGINT or SIGTERM, on any process, asks all to stop (`Peers`).

  A second one interrupts. signal: this process's, None where another was asked.
  """

  def __init__(self, peers: Peers):
    self.signal: int | None = None
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

  def check(self) -> None:
    """Raise Stopping where all processes stop; each asks as often as the others."""
    if self._peers.poll():
      raise Stopping

  def barrier(self) -> None:
    """Raise Stopping if any process was asked to stop by now; between two kinds of work."""
    if self._peers.any_asked():
      raise Stopping


class Watchdog:
  """A thread that ends a process in which a collective, file system or data source hangs.

  Without a heartbeat for `seconds` (0: for ever) it writes all stacks to stderr and
  `directory`/stacks_PROCESS.txt, calls `on_stall` with a sentence, and leaves with `exit_code`. If
  the interpreter itself hangs, faulthandler's thread writes the stacks and leaves with 1.
  """

  def __init__(
    self, seconds: float, *, directory: Path, on_stall: Callable[[str], None], exit_code: int
  ):
    self._seconds, self._what = seconds, 'step'
    self._directory, self._on_stall, self._exit_code = directory, on_stall, exit_code
    self._closed = threading.Event()
    self._stacks = None
    self.heartbeat()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._thread.start()

  def heartbeat(self) -> None:
    """Note a sign of life."""
    self._last = time.monotonic()

  @contextlib.contextmanager
  def allow(self, seconds: float, what: str) -> Iterator[None]:
    """Expect a heartbeat every `seconds` within; 0 for no limit. `what` names the work."""
    before = (self._seconds, self._what)
    self.heartbeat()
    self._seconds, self._what = seconds, what
    try:
      yield
    finally:
      self.heartbeat()
      self._seconds, self._what = before

  def close(self) -> None:
    """Stop watching."""
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
    """Put off faulthandler, which acts when even this thread runs no more."""
    if limit:
      self._stacks = self._open() if self._stacks is None else self._stacks
      faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=self._stacks)
    elif self._stacks is not None:
      faulthandler.cancel_dump_traceback_later()

  def _open(self) -> IO[str] | int:
    """Open the file, or stderr where there can be none: this thread must not die of a full disk."""
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      return self._file().open('w', encoding='utf-8')
    except OSError:
      return _STDERR

  def _file(self) -> Path:
    return self._directory / f'stacks_{jax.process_index()}.txt'

  def _stall(self, sentence: str) -> None:
    faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True, file=self._stacks)
    say(f'{sentence}; the stacks of all threads follow', 'diffusion_jax: ')
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    if self._stacks is not _STDERR:
      faulthandler.dump_traceback(file=self._stacks, all_threads=True)
    try:
      self._on_stall(f'{sentence}; where, is in {self._file()}')
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(self._exit_code)


def resources() -> dict[str, float]:
  """Memory and its peak in bytes, open files, threads: numbers in which leaks show.

  Of the host and the fullest device of this process, if known; outside of Linux without the host's.
  """
  found: dict[str, float] = {'threads': threading.active_count()}
  proc = Path('/proc/self')
  if proc.is_dir():
    status = (proc / 'status').read_text(encoding='utf-8', errors='replace')
    lines = dict(line.split(':', 1) for line in status.splitlines())
    kilobytes = lambda name: int(lines[name].split()[0]) * 1024
    found |= {
      'host_memory': kilobytes('VmRSS'), 'host_memory_peak': kilobytes('VmHWM'),
      'threads': int(lines['Threads']), 'open_files': len(os.listdir(proc / 'fd')),
    }
  stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  for name, key in (('device_memory', 'bytes_in_use'), ('device_memory_peak', 'peak_bytes_in_use')):
    values = [one[key] for one in stats if key in one]
    if values:
      found[name] = max(values)
  return found


class Compilations:
  """A count of programs that XLA has compiled or fetched from its cache since it was made, in the
  thread that made it.

  After the first step training compiles there only for batch shapes that it did not foresee.
  """

  _EVENT = '/jax/core/compile/backend_compile_duration'

  def __init__(self):
    self.count, self._thread = 0, threading.get_ident()
    monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, seconds: float, **more) -> None:
    del seconds, more
    self.count += event == self._EVENT and threading.get_ident() == self._thread

  def close(self) -> None:
    """Stop counting."""
    monitoring.unregister_event_duration_listener(self._heard)


@dataclasses.dataclass
class _Failure:
  """reason: the last. times: in a row. again: the work, None where it is not kept."""

  reason: str
  times: int
  again: Callable[[], Any] | None
  due: float


class BestEffort:
  """Work whose failure is named, counted, retried, and never raised, whatever the error."""

  def __init__(self, say: Callable[[str], None], retry_seconds: float = RETRY_SECONDS):
    self.say, self._retry_seconds = say, retry_seconds
    self._failures: dict[str, _Failure] = {}
    self._dropped = 0

  @property
  def errors(self) -> list[str]:
    """A sentence for each work whose last try has failed."""
    found = [
      f'{what}: {failure.reason}' + (f' ({failure.times} times)' if failure.times > 1 else '')
      for what, failure in self._failures.items()
    ]
    return found + [f'{self._dropped} more were given up'] * bool(self._dropped)

  def __call__(
    self, what: str, work: Callable[[], T], otherwise: T | None = None, *, keep: bool = False
  ) -> T | None:
    """work(), or `otherwise` where it fails; what: its name, whose next success ends the error.

    keep: try it again, by `again`.
    """
    try:
      result = work()
    except Stopping:
      raise
    except Exception as error:
      self._failed(what, error, work if keep else None)
      return otherwise
    if self._failures.pop(what, None) is not None:
      self.say(f'{what} has succeeded again.')
    return result

  def together(self, what: str, work: Callable[[], T], otherwise: T | None = None) -> T | None:
    """A call for work of all processes; with several, errors are raised: others may wait."""
    return work() if jax.process_count() > 1 else self(what, work, otherwise)

  def _failed(self, what: str, error: Exception, again: Callable[[], Any] | None) -> None:
    before, reason = self._failures.pop(what, None), first_line(error)
    self._failures[what] = _Failure(
      reason, before.times + 1 if before else 1, again, time.monotonic() + self._retry_seconds
    )
    if before is None or before.reason != reason:
      later = f'; trying again in {self._retry_seconds:g} s' if again else ''
      self.say(f'{what} failed ({reason}); training goes on without{later}.')
    kept = [name for name, failure in self._failures.items() if failure.again is not None]
    for name in kept[:-_MOST_KEPT]:
      del self._failures[name]
      self._dropped += 1

  def again(self, now: bool = False) -> None:
    """Try again what has failed and is due; all of it with `now`."""
    for what, failure in list(self._failures.items()):
      if failure.again is not None and (now or time.monotonic() >= failure.due):
        self(what, failure.again, keep=True)


class Safety:
  """The status file, the peers, the watchdog and the stop requests of one start.

  facts: returns the progress, for the status file. training: training has begun, so an error is
  more than a refused start. note: added to the last error's message.
  """

  def __init__(self, start: Start, config: SafetyConfig):
    self.start, self.config, self._status = start, config, start.status
    self.facts: Callable[[], dict[str, Any]] = self._status.facts_before
    self.training, self.note = False, ''
    self._index, self._count = jax.process_index(), jax.process_count()
    self._told = 0.0
    if start.lock is not None:
      start.lock.on_lost = self._replaced
    self.peers = Peers(config.peer_timeout_seconds, self._lost)
    self.stop = StopRequest(self.peers)
    self.watchdog = Watchdog(
      config.step_timeout_seconds, directory=start.directory.path, on_stall=self._stalled,
      exit_code=TRY_AGAIN,
    )

  def report(self, state: str, *, now: bool = True, **more: Any) -> None:
    """Write how things stand; without `now` no more than once a second."""
    if now or time.monotonic() - self._told > 1:
      self._told = time.monotonic()
      self._status(state, **self.facts(), **more)

  def check(self) -> None:
    """Note a sign of life; raise Stopping where all processes stop."""
    self.watchdog.heartbeat()
    if self.start.lock is not None:
      self.start.lock.check()
    self.stop.check()

  @contextlib.contextmanager
  def watching(self):
    """Report whatever error ends the work within, then raise it."""
    try:
      with self.stop, listening(self.check):
        yield
    except BaseException as error:
      self._fail(error)
      raise
    finally:
      self.watchdog.close()
      self.peers.close()

  def _fail(self, error: BaseException) -> None:
    message = f'{type(error).__name__}: {error}'
    if self._count > 1 and any(word in message.lower() for word in _OF_A_PEER):
      # Most likely another process is gone; then `_lost` leaves from its thread meanwhile.
      with self.watchdog.allow(0, 'word of the other processes'):
        self.peers.confirm_gone()
    state, code = _verdict(error)
    if state == 'interrupted' and self.training:
      message = 'left at once by a second signal, without saving'
    if self.training:
      message = f'{message[:500]}{self.note}'
      self._status(state, everyone=True, **self.facts(), message=message)
    else:
      self.start.end(error)
    if self._count > 1:
      # Leaving in order would wait for processes that wait for this one.
      if isinstance(error, UserError | Diverged):
        say(str(error))
      else:
        traceback.print_exc()
      self.peers.leave(state)
      self._leave_at_once(code)

  def _lost(self, sentence: str) -> None:
    """Leave, as another process is gone."""
    _, why = self.peers.gone
    if not why:
      message = f'{sentence}; start again to go on from the last checkpoint'
      self._status('peer_lost', everyone=True, **self.facts(), message=message)
    say(f'process {self._index} leaves: {sentence}', 'diffusion_jax: ')
    self._leave_at_once(TRY_AGAIN if why in ('', 'stalled') else 1)

  def _replaced(self, sentence: str) -> None:
    """Leave, as another start has the workdir now: every file in it is that one's."""
    self._status.silence()
    say(f'{sentence}; leaving')
    self.peers.leave('replaced')
    self._leave_at_once(1)

  def _leave_at_once(self, code: int) -> None:
    self.start.release_at_once()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _stalled(self, message: str) -> None:
    self._status('stalled', everyone=True, **self.facts(), message=message)
    last_word = threading.Thread(target=self.peers.leave, args=('stalled',), daemon=True)
    last_word.start()
    last_word.join(10)  # The coordinator may stand still, too.
    self.start.release_at_once()


def _verdict(error: BaseException) -> tuple[str, int]:
  """Return (state, exit code) of a run that this error ends."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted', 130
  if isinstance(error, Diverged):
    return 'diverged', 1
  return 'failed', 2 if isinstance(error, UserError) else 1
