"""status.json: how a run stands, for launchers, reports and people."""

import contextlib
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, bounded_bytes, first_line, say
from diffusion_jax.runs import keeper
from diffusion_jax.runs.directory import RunDirectory

NAME = 'status.json'
GOES_ON = (
  'starting', 'encoding', 'compiling', 'training', 'sampling', 'evaluating', 'saving', 'finishing',
)
RETRY = (*GOES_ON, 'interrupted', 'peer_lost', 'stalled', 'unsaved')
"""States after which the same command goes on; after the others it would do nothing or fail."""


class Status:
  """A writer of status.json that stays true after a sudden end.

  Keys: state; retry, whether the same command again would go on; message; step, total_steps,
  seconds (of all starts), pid, host, updated (seconds since 1970), start (its name) and the
  caller's.

  Process 0 writes progress, any failing process its reason. Every process has a keeper
  (`runs.keeper`), which writes 'killed' at an end without a final status. before: the last status
  of the start before, or {}. start: name of this start, in all processes. final: this process's
  final status is written.
  """

  def __init__(self, directory: RunDirectory, process: int, processes: int):
    self._directory, self._main = directory, process == 0
    self._what = f'process {process} of {processes}' if processes > 1 else 'the process'
    self._keeper: subprocess.Popen | None = None
    self._lock = threading.Lock()
    self._found = _content(directory)
    self.before = read_status(directory)
    self.start = secrets.token_hex(8)
    self.final = False
    self._problem = ''

  def facts_before(self) -> dict[str, Any]:
    """Return how far the start before this one came, as far as its word makes sense."""
    found = {name: self.before.get(name) for name in ('step', 'total_steps', 'seconds')}
    facts = {name: value for name, value in found.items() if _is_amount(value)}
    return {'step': 0} | facts | ({'goodput': spent} if (spent := self.goodput_before()) else {})

  def goodput_before(self) -> dict[str, float]:
    """Return the seconds by phase of all starts before this one, {} where that is not known."""
    spent = self.before.get('goodput')
    return spent if isinstance(spent, dict) and all(map(_is_amount, spent.values())) else {}

  def seconds_since(self) -> float:
    """Return the seconds since the last word of the start before; 0 where there is none."""
    updated = self.before.get('updated')
    return max(0.0, time.time() - updated) if _is_amount(updated) else 0.0

  def __call__(self, state: str, *, everyone: bool = False, **values: Any) -> None:
    """Write the state, unless after a final one; everyone: from any process, not only 0."""
    with self._lock:
      if self.final:
        return
      self.final = state in keeper.FINAL
      record = {
        'state': state, 'retry': state in RETRY, 'message': '', **values, 'pid': os.getpid(),
        'host': socket.gethostname(), 'updated': time.time(), 'start': self.start,
      }
      # The keeper hears of what goes on before the file shows it, and of the end after it: whenever
      # a kill comes, what the keeper then writes is not older than the file, and never missing.
      if not self.final:
        self._tell_keeper(record)
      if self._main or everyone:
        self._write(record)
      if self.final:
        self._tell_keeper(record)

  def _write(self, record: dict[str, Any]) -> None:
    """Write where it is possible: a full disk must not end what the file only describes."""
    problem = ''
    try:
      self._directory.write_json(NAME, record)
    except OSError as error:
      problem = first_line(error)
    if problem and problem != self._problem:
      say(f'{NAME} cannot be written ({problem}).')
    self._problem = problem

  def put_back(self) -> None:
    """Restore the file as this start has found it: the run stands as it stood before."""
    with self._lock:
      if self.final:
        return
      self.silence()
      path = self._directory.path / NAME
      with contextlib.suppress(OSError):
        if self._main and self._found is None:
          path.unlink(missing_ok=True)
        elif self._main:
          with atomic_write(path) as file:
            file.write(self._found)

  def silence(self) -> None:
    """Let neither this process nor its keeper write anything from here on."""
    self.final = True
    if self._keeper is not None:
      self._tell_keeper({'state': 'refused'})

  def _tell_keeper(self, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Someone has killed it, or there can be no more processes.
      if self._keeper is None:
        # In a session of its own: a signal to the whole group must not reach it.
        self._keeper = subprocess.Popen(
          [sys.executable, '-S', '-E', keeper.__file__, str(self._directory.path / NAME)],
          stdin=subprocess.PIPE, text=True, start_new_session=True,
        )
      before = self.before.get('start', '')
      values = {**record, 'what': self._what, 'before': before if isinstance(before, str) else ''}
      self._keeper.stdin.write(json.dumps(values) + '\n')
      self._keeper.stdin.flush()

  def close(self) -> None:
    """Let the keeper go. Without a final state it writes that the run was killed."""
    if self._keeper is not None:
      with contextlib.suppress(OSError):
        self._keeper.stdin.close()
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._keeper.wait(10)
      self._keeper = None


def read_status(directory: RunDirectory) -> dict[str, Any]:
  """A run's status.json; {} where there is none or it cannot be read."""
  try:
    return directory.read_json(NAME)
  except UserError:
    return {}


def is_stalled(directory: RunDirectory, seconds: float) -> bool:
  """True if a run is over, or silent for so long; without a status, by its newest file."""
  status = read_status(directory)
  retry, updated = status.get('retry'), status.get('updated')
  if not isinstance(retry, bool) or not _is_amount(updated):
    found = [path for path in (directory.path, directory.checkpoints) if path.is_dir()]
    retry, updated = True, max((path.stat().st_mtime for path in found), default=0.0)
  return not retry or time.time() - updated > seconds


def _content(directory: RunDirectory) -> bytes | None:
  try:
    return bounded_bytes(directory.path / NAME)
  except UserError:
    return None


def _is_amount(value: Any) -> bool:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and math.isfinite(value) and value >= 0
