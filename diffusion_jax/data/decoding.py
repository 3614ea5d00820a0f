"""Processes that decode pictures, where threads wait for each other."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from diffusion_jax.files import say


class Decoders:
  """Calls functions of pictures in other processes, which import no more than those need.

  They start with the first call, and end with this process, however it ends. If one of them dies,
  all further calls are made here.

  count: processes; what calls them are the loader's threads, one picture at a time each.
  """

  def __init__(self, count: int):
    self.count = count
    self._lock, self._broken = threading.Lock(), False
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None

  def __reduce__(self) -> tuple:
    return type(self), (self.count,)

  def __call__(self, function: Callable, *arguments: Any) -> Any:
    """Return what a function of a module returns, or raise what it raises."""
    pool = self._started()
    if pool is None:
      return function(*arguments)
    try:
      return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
      with self._lock:
        if not self._broken:
          say('a process that decodes pictures has died; from now on they are decoded in threads')
        self._broken = True
      return function(*arguments)

  def _started(self) -> concurrent.futures.ProcessPoolExecutor | None:
    with self._lock:
      if self._broken:
        return None
      if self._pool is None:
        self._pool = concurrent.futures.ProcessPoolExecutor(
          self.count, multiprocessing.get_context('spawn'), initializer=_begin
        )
      return self._pool


def here(function: Callable, *arguments: Any) -> Any:
  """Call a function in this thread."""
  return function(*arguments)


def _begin() -> None:
  """What signals mean is for the process to say that started this one, with which it ends."""
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def leave() -> None:
    wait([parent.sentinel])
    os._exit(0)

  threading.Thread(target=leave, daemon=True).start()
