"""Messages between the processes of one run, besides their collectives.

A collective that one process does not join hangs or fails on all others, so these use the key-value
store of JAX's coordination service, from any thread while programs run: barriers with agreement,
heartbeats, failures and requests to stop. Orbax's `reached_preemption` misses Ctrl-C; JAX's
heartbeats end a process by SIGABRT, without a status or a telling exit code.
"""

import contextlib
import hashlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.files import first_line

T = TypeVar('T')

TIMEOUT_SECONDS, A_DAY = 1200, 86_400
PERIOD_SECONDS, PERIOD_SECONDS_A_PROCESS = 0.1, 0.001
"""Between two heartbeats, so that process 0 hears some 2,000 messages a second at most."""
_PIECE = 2**22
"""Bytes of each process that devices pass on at a time."""
_rounds: Counter[str] = Counter()
_meetings = itertools.count()
_listener: ContextVar[Callable[[], None] | None] = ContextVar('listener', default=None)


def _store() -> Any:
  """Return the client of the key-value store, to which JAX itself has no public door."""
  from orbax.checkpoint import multihost  # Here, for it is heavy, and one process needs none.

  return multihost.get_jax_distributed_client()


def agree(name: str, value: str, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
  """Every process's value, in the order of processes; a barrier without devices.

  All call it equally often under each name, one thread at a time. TimeoutError if one is late.
  """
  count, index = jax.process_count(), jax.process_index()
  if count == 1:
    return [value]
  _rounds[name] += 1
  store = _store()
  keys = [f'diffusion_jax/{name}/{_rounds[name] - back}' for back in (0, 1)]
  get = lambda key: json.loads(store.blocking_key_value_get(key, int(timeout_seconds * 1000)))
  try:
    if index:
      store.key_value_set(f'{keys[0]}/{index}', json.dumps(value))
      return get(f'{keys[0]}/all')
    values = [value, *(get(f'{keys[0]}/{other}') for other in range(1, count))]
    store.key_value_set(f'{keys[0]}/all', json.dumps(values))
  except jax.errors.JaxRuntimeError as error:
    raise TimeoutError(f'processes did not agree on {name}: {error}') from error
  if _rounds[name] > 1:  # Who has come to this round has read the one before.
    store.key_value_delete(f'{keys[1]}/')
  return values


def in_step(
  name: str, function: Callable[[], T], kinds: tuple[type[Exception], ...],
  timeout_seconds: float = TIMEOUT_SECONDS,
) -> T:
  """Return function() of here; where it raises one of `kinds` anywhere, all raise the same."""
  value, mine = None, ''
  try:
    value = function()
  except kinds as error:
    kind = next(kind for kind in kinds if isinstance(error, kind))
    mine = json.dumps([kind.__name__, str(error)])
  for answer in agree(name, mine, timeout_seconds):
    if answer:
      raised, text = json.loads(answer)
      raise next(kind for kind in kinds if kind.__name__ == raised)(text)
  return value


def post(name: str, text: str) -> None:
  """Leave a text for all processes, without waiting for any; nothing with one process."""
  if jax.process_count() > 1:
    key = f'diffusion_jax/{name}/{hashlib.sha256(text.encode(errors="replace")).hexdigest()}'
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Posted before, or no one is there.
      _store().key_value_set(key, json.dumps(text))


def posted(name: str) -> list[str]:
  """Return what all processes have posted under a name so far."""
  if jax.process_count() == 1:
    return []
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    found = _store().key_value_dir_get(f'diffusion_jax/{name}/')
    return [json.loads(text) for _, text in found]
  return []


def sum_over_processes(x: np.ndarray) -> np.ndarray:
  """Return the sum of every process's array, over the devices; all must call it together."""
  if jax.process_count() == 1:
    return x
  return multihost_utils.process_allgather(x).sum(axis=0, dtype=x.dtype)


def gather_bytes(data: bytes) -> list[bytes]:
  """Return what every process gives, in their order, piece by piece over the devices; all must call
  it together."""
  if jax.process_count() == 1:
    return [data]
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  pieces = []
  for first in range(0, int(max(sizes)), _PIECE):
    piece = np.zeros(_PIECE, np.uint8)
    own = np.frombuffer(data[first : first + _PIECE], np.uint8)
    piece[: len(own)] = own
    pieces.append(np.asarray(multihost_utils.process_allgather(piece)))
  every = np.concatenate(pieces, axis=1) if pieces else np.zeros((len(sizes), 0), np.uint8)
  return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]


def heartbeat() -> None:
  """Call the listener, after one batch of long work; it may raise, to stop the work."""
  if (listener := _listener.get()) is not None:
    listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
  """Call `listener` at every heartbeat within."""
  token = _listener.set(listener)
  try:
    yield
  finally:
    _listener.reset(token)


class Peers:
  """Threads that keep processes in touch; with one process, a flag.

  Every period a thread of each process puts its news into the store; process 0's reads them all and
  publishes one verdict: two small messages a process.

  Stopping: processes count their polls, alike in all (before each step, after each batch of an
  evaluation). Once one is asked to stop, each thread publishes its count and holds the next poll
  until the verdict, the largest count plus one, where all stop. Main threads may meanwhile wait
  within a step.

  timeout_seconds: without news for that long a process is lost. on_lost: called once from the
  thread with a sentence that names it.
  """

  def __init__(self, timeout_seconds: float, on_lost: Callable[[str], None]):
    self._timeout, self._on_lost = timeout_seconds, on_lost
    self._count, self._index = jax.process_count(), jax.process_index()
    period = PERIOD_SECONDS + PERIOD_SECONDS_A_PROCESS * self._count
    self._period = min(period, timeout_seconds / 5)
    self._news = {'heartbeat': 0, 'stop': False, 'polls': None, 'left': ''}
    self._verdict: dict = {'stop': False, 'until': None, 'gone': None}
    self._polls, self._asked = 0, False
    self._lock, self._closed = threading.Condition(), threading.Event()
    # Keys outlive a meeting; all processes hold the same number of them in the same order.
    self._room = f'diffusion_jax/peers/{next(_meetings)}'
    self.gone: tuple[int, str] | None = None
    """(process, why) of the first process that is gone; why is '' for one that fell silent."""
    if self._count > 1:
      self._store = _store()
      self._thread = threading.Thread(target=self._run, name='peers', daemon=True)
      self._thread.start()

  def ask_to_stop(self) -> None:
    """Ask all processes to stop; safe in a signal handler."""
    self._asked = True

  def poll(self) -> bool:
    """Say whether to stop here. Each polls as often as the others, and all stop at one poll."""
    if self._count == 1:
      return self._asked
    with self._lock:
      self._polls += 1
      while self._news['polls'] is not None and self._verdict['until'] is None:
        self._lock.wait(self._period)  # All others publish from threads, so this ends.
      until = self._verdict['until']
      return until is not None and self._polls >= until

  def any_asked(self) -> bool:
    """Say whether any process has been asked to stop by now; a barrier, as `poll` may be late."""
    return 'True' in agree('stop', str(self._asked))

  def leave(self, why: str) -> None:
    """Tell the others, before it returns, that this process gives up and why."""
    if self._count == 1 or self._closed.is_set():
      return
    self._news['left'] = why or 'left'
    with contextlib.suppress(Exception):  # It may be the coordinator that is gone.
      self._publish()
      if self._index == 0:  # With process 0 goes the place where news are kept.
        self._judge({})
        time.sleep(3 * self._period)

  def confirm_gone(self) -> None:
    """Wait a little over the timeout for news that another process is gone, then for `on_lost`."""
    if self._count == 1:
      return
    end = time.monotonic() + self._timeout + 3 * self._period
    while self.gone is None and time.monotonic() < end:
      time.sleep(self._period / 2)
    if self.gone is not None:
      self._thread.join()

  def close(self) -> None:
    """End the thread; from here on nothing is watched."""
    self._closed.set()
    if self._count > 1 and threading.current_thread() is not self._thread:
      self._news['left'] = self._news['left'] or 'done'
      self._thread.join(5)

  def _run(self) -> None:
    seen: dict[int, tuple[int, float]] = {}
    reached = time.monotonic()
    while not self._closed.wait(self._period):
      try:
        self._publish()
        if self._index == 0:
          self._judge(seen)
        self._obey()
        reached = time.monotonic()
      except Exception as error:  # The runtime raises its own kinds, some of them bare.
        if time.monotonic() - reached > self._timeout:
          self._lose(0, '', f'the coordinator (process 0) has not answered for '
                     f'{self._timeout:g} s ({first_line(error)[:120]})')
          return
    with contextlib.suppress(Exception):  # The coordinator may be the first to go.
      self._publish()  # 'done': its silence from now on means nothing.

  def _publish(self) -> None:
    self._news['heartbeat'] += 1
    self._news['stop'] = self._news['stop'] or self._asked
    self._put(f'news/{self._index}', self._news)

  def _put(self, key: str, value: dict) -> None:
    self._store.key_value_set(f'{self._room}/{key}', json.dumps(value), allow_overwrite=True)

  def _judge(self, seen: dict[int, tuple[int, float]]) -> None:
    """Put up process 0's conclusions from everybody's news. seen: index -> (heartbeat, since)."""
    now, verdict = time.monotonic(), dict(self._verdict)
    news = {
      int(key.rpartition('/')[2]): json.loads(value)
      for key, value in self._store.key_value_dir_get(f'{self._room}/news/')
    }
    for index, item in news.items():
      if index not in seen or seen[index][0] != item['heartbeat']:
        seen[index] = (item['heartbeat'], now)
      silent = now - seen[index][1] > self._timeout and item['left'] != 'done'
      if verdict['gone'] is None and (silent or item['left'] not in ('', 'done')):
        verdict['gone'] = [index, item['left']]
    verdict['stop'] = verdict['stop'] or any(item['stop'] for item in news.values())
    polls = [item['polls'] for item in news.values()]
    if verdict['until'] is None and len(polls) == self._count and None not in polls:
      verdict['until'] = max(polls) + 1
    self._put('verdict/0', verdict)

  def _obey(self) -> None:
    """Take over what process 0 has concluded."""
    verdicts = self._store.key_value_dir_get(f'{self._room}/verdict/')
    if not verdicts:  # Process 0 has not begun yet.
      return
    with self._lock:
      self._verdict = json.loads(verdicts[0][1])
      if self._verdict['stop'] and self._news['polls'] is None:
        self._news['polls'] = self._polls
      self._lock.notify_all()
    if self._verdict['gone'] is not None:
      index, why = self._verdict['gone']
      if index != self._index:
        said = f'said: {why}' if why else f'has been silent for {self._timeout:g} s'
        self._lose(index, why, f'process {index} of {self._count} is gone; it {said}')

  def _lose(self, index: int, why: str, sentence: str) -> None:
    if self.gone is None and not self._closed.is_set():
      self.gone = (index, why)
      if self._index == 0:  # It keeps the news: the others, too, must have read them.
        time.sleep(3 * self._period)
      self._on_lost(sentence)
