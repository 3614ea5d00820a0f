"""Processes for the two sides of benchmarks/peers.py, which do what they are told over a pipe.

Process is the parent's end. The child, `python -m benchmarks.peer_process SIDE DESCRIPTOR`, sleeps
until it is asked for something, so that a side has the machine to itself while it works.
"""

import contextlib
import importlib
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from diffusion_jax.__main__ import set_up_process
from diffusion_jax.errors import UserError

ROOT = Path(__file__).parents[1]
MODULES = {'ours': 'benchmarks.peer_ours', 'theirs': 'benchmarks.peer_torch'}
"""Side: the module with its `facts` and its class `Side`."""


class Process:
  """One side in a process of its own, which ends with the `with` block, whatever happens there.

  side: one of MODULES. name: for messages. more: what its environment has beside the parent's.
  """

  def __init__(self, side: str, name: str, more: dict[str, str] | None = None):
    self.name = name
    self._pipe, its_end = Pipe()
    number = its_end.fileno()
    with its_end:  # Only the child shall hold it, or its death would not be seen.
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.peer_process', side, str(number)], cwd=ROOT,
        pass_fds=(number,), env={**os.environ, **(more or {})},
        start_new_session=True,  # A group of its own, so that its compilers end with it.
      )

  @property
  def id(self) -> int:
    """The id of the process, and of the group of what it starts."""
    return self._process.pid

  def __enter__(self) -> 'Process':
    return self

  def __exit__(self, *_) -> None:
    # It holds nothing that would have to be saved, and may be in the midst of its work.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.id, signal.SIGKILL)
    self._process.wait()
    self._pipe.close()

  def ask(self, what: str, *args: Any) -> Any:
    """Return what the child's Worker.what(*args) does; end the program where that fails."""
    try:
      self._pipe.send((what, args))
      done, answer = self._pipe.recv()
    except (EOFError, ConnectionError):
      code = self._process.wait()
      how = f'was ended by {signal.Signals(-code).name}' if code < 0 else f'ended with code {code}'
      sys.exit(f'The process of {self.name} {how}.')
    if not done:
      sys.exit(f'{self.name} failed: {answer}')
    return answer


class Worker:
  """The methods of the child; arrays and plain values come and go."""

  def __init__(self, side: str):
    self._name = side

  def load(self) -> dict[str, Any]:
    """Imports the side; its device and versions."""
    self._module = importlib.import_module(MODULES[self._name])
    return self._module.facts()

  def make(self, *args) -> None:
    """Builds the side."""
    self._side = self._module.Side(*args)

  def call(self, method: str, *args) -> Any:
    """Return what a method of the side does."""
    return getattr(self._side, method)(*args)

  def prepare(self, method: str, *args) -> None:
    """Has a method of the side make the function that `run` runs."""
    self._run = getattr(self._side, method)(*args)

  def run(self) -> tuple[Any, float, float]:
    """(result, seconds on the clock, seconds of the processors) of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = self._run()
    return result, time.perf_counter() - wall, time.process_time() - cpu

  def peak(self) -> int:
    """Bytes of resident memory at most so far.

    Linux counts in what the parent has held before it started this process, so it should be small.
    """
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def answer(worker: Worker, request: bytes) -> tuple[bool, Any]:
  """(True, what was asked for) or (False, why there is none)."""
  try:
    what, args = pickle.loads(request)
    return True, getattr(worker, what)(*args)
  except UserError as error:
    return False, str(error)
  except Exception as error:
    traceback.print_exc()
    return False, f'{type(error).__name__}: {error}'


def listen(pipe: Connection, requests: queue.SimpleQueue) -> None:
  """Passes requests on; ends this process and those it has started once the parent is gone."""
  try:
    while True:
      requests.put(pipe.recv_bytes())
  except (EOFError, OSError):
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(side: str, descriptor: str) -> None:
  """The child: answers one request after another."""
  if side == 'ours':
    set_up_process()
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs its part.
  pipe, requests = Connection(int(descriptor)), queue.SimpleQueue()
  os.set_inheritable(pipe.fileno(), False)
  threading.Thread(target=listen, args=(pipe, requests), daemon=True).start()
  worker = Worker(side)
  while True:
    pipe.send(answer(worker, requests.get()))


if __name__ == '__main__':
  main(*sys.argv[1:])
