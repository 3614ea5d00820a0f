"""Jobs done by processes of their own, which end with the one that started them."""

import collections
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from diffusion_jax.errors import UserError

COUNT, DONE, FAILED = 'count', 'done', 'failed'
_READY = 'ready'
EVERY = 16
"""Counts that are sent together."""


def processors() -> int:
  """How many this process may use."""
  may = getattr(os, 'sched_getaffinity', None)  # Not on every system.
  return len(may(0)) if may else os.cpu_count() or 1


class Done(NamedTuple):
  """A job, and what it gave."""

  job: Any
  result: Any


class _Counts:
  """Sends counts, several at a time."""

  def __init__(self, send: Callable[[int], None]):
    self._send, self._waiting = send, 0

  def __call__(self, count: int) -> None:
    self._waiting += count
    if self._waiting >= EVERY:
      self.flush()

  def flush(self) -> None:
    if self._waiting:
      self._send(self._waiting)
    self._waiting = 0


def in_processes(
  work: Callable[[Any, Any, Callable[[int], None]], Any], shared: Any, jobs: Sequence[Any],
  workers: int, count: Callable[[int], None],
) -> Iterator[Done]:
  """Yield jobs with their results as they are done, in any order.

  work: work(shared, job, count), of a module's top level. workers: 1 for this process alone. count:
  called in this process with what jobs count. An error of a job ends all. UserError: a process was
  killed.
  """
  if workers == 1 or len(jobs) < 2:
    for job in jobs:
      yield Done(job, work(shared, job, count))
    return
  context = multiprocessing.get_context('spawn')  # Threads of this process do no harm then.
  waiting, running = collections.deque(jobs), {}
  try:
    for _ in range(min(workers, len(jobs))):
      ours, theirs = context.Pipe()
      process = context.Process(target=_serve, args=(theirs, work, shared), daemon=True)
      process.start()
      theirs.close()
      running[ours] = process
    while running:
      for connection in wait(list(running)):
        yield from _answer(connection, running, waiting, count)
  finally:
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.join()


def _answer(
  connection: Connection, running: dict[Connection, Any], waiting: collections.deque,
  count: Callable[[int], None],
) -> Iterator[Done]:
  try:
    kind, value = connection.recv()
  except (EOFError, OSError):
    process = running.pop(connection)
    process.join()
    raise UserError(
      f'a process of it was ended with code {process.exitcode}, perhaps for want of memory; run '
      'the command again with fewer --workers: whole shards are kept.'
    ) from None
  if kind == COUNT:
    count(value)
  elif kind == FAILED:
    raise value if isinstance(value, Exception) else RuntimeError(value)
  if kind == DONE:
    yield value
  if kind in (DONE, _READY):
    if waiting:
      connection.send(waiting.popleft())
    else:
      connection.send(None)
      running.pop(connection).join()


def _serve(connection: Connection, work: Callable, shared: Any) -> None:
  """Do jobs until there are no more, or the parent is gone."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent gets it too, and ends this process.
  threading.Thread(target=_end_with_parent, daemon=True).start()
  connection.send((_READY, None))
  while (job := connection.recv()) is not None:
    counts = _Counts(lambda count: connection.send((COUNT, count)))
    try:
      result = work(shared, job, counts)
    except UserError as error:
      connection.send((FAILED, error))
    except Exception:
      connection.send((FAILED, traceback.format_exc()))
    else:
      counts.flush()
      connection.send((DONE, Done(job, result)))


def _end_with_parent() -> None:
  """A killed parent can end nobody; a process without one must not go on writing."""
  wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
