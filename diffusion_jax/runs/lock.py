"""One run at a time in a workdir: a lock that names its holder, and outlives no process.

A small file, WORKDIR/run.N.lock, as system file locks fail on some shared file systems. No clocks
are compared: a holder touches its file every few seconds, and others, if they cannot ask for the
process, watch whether the file changes.
"""

import contextlib
import json
import os
import random
import re
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError
from diffusion_jax.files import parse_json

HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 65.0
"""A lock that has not been touched for so long is a dead process's. Some shared file systems show a
change only after a minute."""
_NAME = re.compile(r'run\.([1-9][0-9]{0,8})\.lock')
_MOST_BYTES = 10_000


class Seen(NamedTuple):
  """A lock file at one moment: its content, and what changes whenever it is touched."""

  text: bytes
  touched: tuple[int, int]


class RunLock:
  """The lock of one workdir, which must exist.

  A new holder takes the number after those of existing locks, all found dead: of several only one
  can make that file. One that then finds a lock it has not looked at withdraws and looks again.

  on_lost: called once, from a thread, with a sentence, when another took over because this process
  stood still so long that it seemed dead. say: reports a long wait for a holder's signs of life.
  """

  def __init__(
    self, folder: Path, on_lost: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
  ):
    self.folder, self.on_lost, self._say = folder, on_lost, say
    self._text = json.dumps(_this_process()).encode()
    self._path: Path | None = None
    self._turn = threading.Lock()
    self._closed = threading.Event()
    self._confirmed = time.monotonic()
    self.lost = False

  def take(self) -> None:
    """Take the lock; UserError where another run holds it, OSError where no file can be made."""
    while True:
      self._path = None
      seen = self._others()
      for path, lock in seen.items():
        self._outlive(path, lock)
      names = map(_NAME.fullmatch, os.listdir(self.folder))
      number = max((int(name[1]) for name in names if name), default=0) + 1
      if self._make(self.folder / f'run.{number}.lock'):
        if self._others().items() <= seen.items():
          break
        self._path.unlink(missing_ok=True)
      time.sleep(random.uniform(0.02, 0.2))
    for path in seen:
      path.unlink(missing_ok=True)
    self._confirmed = time.monotonic()
    threading.Thread(target=self._keep, name='run lock', daemon=True).start()

  def _make(self, path: Path) -> bool:
    """Make the file, and so hold it; False where another has made it."""
    try:
      file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
      return False
    self._path = path
    # On a full disk it stays empty or cut: that does not say whose it is, but that it is.
    with contextlib.suppress(OSError):
      try:
        os.write(file, self._text)
      finally:
        os.close(file)
    return True

  def _others(self) -> dict[Path, Seen]:
    """Return all locks but this process's own."""
    paths = [self.folder / name for name in os.listdir(self.folder) if _NAME.fullmatch(name)]
    found = {path: _look(path) for path in paths if path != self._path}
    return {path: lock for path, lock in found.items() if lock is not None}

  def _outlive(self, path: Path, first: Seen) -> None:
    """Return once a lock is known to be a dead process's, or gone. UserError if it lives."""
    since, said, lock = time.monotonic(), False, first
    while lock is not None:
      holder = _holder(lock.text)
      lives = _lives(holder, lock)
      if lives or (lives is None and lock.touched != first.touched and lock.text == first.text):
        raise UserError(_refusal(self.folder, path, holder))
      if lives is False or time.monotonic() - since > LEASE_SECONDS:
        return
      if not said:
        self._say(
          f'{path} is the lock of {_name(holder)}, which cannot be asked from here; waiting up to '
          f'{LEASE_SECONDS:g} s for a sign of life.'
        )
        said = True
      time.sleep(min(0.5, LEASE_SECONDS / 10))
      before, lock = lock, _look(path)
      if lock is not None and lock.text != before.text:
        since, first = time.monotonic(), lock

  def _keep(self) -> None:
    while not self._closed.wait(HEARTBEAT_SECONDS):
      self.confirm()

  def check(self) -> None:
    """Confirm the lock after a pause that may have cost it; costs nothing where there was none."""
    if time.monotonic() - self._confirmed > LEASE_SECONDS / 2:
      self.confirm()

  def confirm(self) -> None:
    """Touch the lock, or learn that another has taken it over."""
    with self._turn:
      if self._closed.is_set() or self.lost:
        return
      try:
        taken_by = self._touch()
      except OSError:  # Whether it is still ours shows when the storage answers again.
        return
      self._confirmed, self.lost = time.monotonic(), taken_by is not None
    if taken_by is not None:
      self.on_lost(
        f'this process stood still for so long that {_name(_holder(taken_by.text))} has taken over '
        f'{self.folder}'
      )

  def _touch(self) -> Seen | None:
    """Touch the file; return the lock that has taken its place, if any."""
    mine = _look(self._path)
    if self._owns(mine):
      complete = mine.text == self._text
      try:
        os.utime(self._path)
      except OSError:
        if not complete:
          raise
      if not complete:
        with contextlib.suppress(OSError):  # The disk may still be full.
          self._path.write_bytes(self._text)
      return None
    if mine is not None:
      return mine
    # Someone has removed it. Whoever came before it was made again holds the lock now.
    made = not self._others() and self._make(self._path)
    other = next(iter(self._others().values()), None)
    if made and other is not None:
      self._path.unlink(missing_ok=True)
    return other

  def _owns(self, lock: Seen | None) -> bool:
    return lock is not None and self._text.startswith(lock.text)

  def release(self) -> None:
    """Let the next one in; a lock that another has taken over is left alone."""
    with self._turn:
      if self._path is None or self._closed.is_set():
        return
      self._closed.set()
      with contextlib.suppress(OSError):
        if self._owns(_look(self._path)):
          self._path.unlink()


def _look(path: Path) -> Seen | None:
  """Read a lock, None where there is none. Opened, or shared file systems answer from memory."""
  try:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  except FileNotFoundError:
    return None
  except PermissionError:
    file = None
  try:
    found = os.stat(path) if file is None else os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
      return None
    text = b'' if file is None else os.read(file, _MOST_BYTES)
    return Seen(text, (found.st_mtime_ns, found.st_ino))
  finally:
    if file is not None:
      os.close(file)


def _this_process() -> dict[str, Any]:
  return {
    'pid': os.getpid(), 'host': socket.gethostname(), 'boot': _boot(), 'processes': _namespace(),
    'started': _started(os.getpid()), 'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'token': secrets.token_hex(8),
  }


def _boot() -> str:
  """Return what changes whenever the machine starts; '' where it cannot be known."""
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
  except OSError:
    return ''


def _namespace() -> str:
  """Name the space of process numbers: containers of one machine have their own."""
  try:
    return os.readlink('/proc/self/ns/pid')
  except OSError:
    return sys.platform


def _started(pid: int) -> str:
  """Return when a process was started, in the kernel's ticks; '' where that cannot be known, 'dead'
  for one that has ended and waits for its exit code to be read."""
  try:
    fields = Path(f'/proc/{pid}/stat').read_bytes().rpartition(b')')[2].split()
    return 'dead' if fields[0] in (b'Z', b'X') else fields[19].decode()
  except (OSError, IndexError):
    return ''


def _holder(text: bytes) -> dict[str, Any]:
  """Return the process that a lock names; {} where that cannot be read."""
  with contextlib.suppress(ValueError):
    if isinstance(found := parse_json(text), dict):
      return found
  return {}


def _lives(holder: dict[str, Any], lock: Seen) -> bool | None:
  """Return whether the process of a lock is alive; None where it cannot be asked from here."""
  pid, host, boot, started = (holder.get(name) for name in ('pid', 'host', 'boot', 'started'))
  if type(pid) is not int or not 0 < pid < 2**31 or not isinstance(boot, str):
    return None
  here = host == socket.gethostname()
  if boot != _boot():
    # A machine of this name whose lock was touched after this one was started may be another.
    return False if here and lock.touched[0] / 1e9 < _up_since() else None
  if holder.get('processes') != _namespace() or (not boot and not here):
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # Another user's.
    pass
  now = _started(pid)
  return not now or now == started


def _up_since() -> float:
  """Return when this machine was started, in seconds since 1970; 0 where it cannot be known."""
  clock = getattr(time, 'CLOCK_BOOTTIME', None)
  return 0.0 if clock is None else time.time() - time.clock_gettime(clock)


def _name(holder: dict[str, Any]) -> str:
  if not holder:
    return 'a process that is not named in it'
  return f'process {str(holder.get("pid"))[:20]} on {str(holder.get("host"))[:100]}'


def _refusal(folder: Path, path: Path, holder: dict[str, Any]) -> str:
  since = holder.get('since')
  return (
    f'the workdir {folder} is in use by {_name(holder)}'
    f'{f", since {since[:40]}" if isinstance(since, str) else ""}; wait for its end, stop it, or '
    f'choose another workdir; where that process is gone for certain, delete {path}.'
  )
