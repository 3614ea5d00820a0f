"""Processes of `python -m MODULE` that are forked from one that has imported diffusion_jax.

Importing takes a third of the time of a process that trains tiny networks, and tests start dozens.
What is forked has no thread, no device and no state of a run yet. Neighbours come from servers of
their own, whose hashes of texts differ, as those of processes that are started one by one do.
"""

import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LATE = {
  'XLA_FLAGS', 'NPROC', 'DIFFUSION_JAX_DATA', 'COORDINATOR_ADDRESS', 'PROCESS_COUNT',
  'PROCESS_INDEX', 'TF_CPP_MIN_LOG_LEVEL',
}
"""Variables that are read when the work begins; others may be read by what is imported."""
LARGEST = 2**18
"""Bytes of a request."""


class Server:
  """The process that others are forked from, which ends with this one."""

  def __init__(self):
    self.environment = early(os.environ)
    self._socket, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    self._lock = threading.Lock()
    with its_end:
      self._process = subprocess.Popen(
        [sys.executable, '-u', '-m', 'tests.forked', str(its_end.fileno())], cwd=ROOT,
        pass_fds=(its_end.fileno(),), stdin=subprocess.DEVNULL,
        env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2'},
      )

  def ask(self, request: dict, descriptors: tuple = ()) -> int | None:
    """The answer to one request."""
    with self._lock:
      socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
      return json.loads(self._socket.recv(LARGEST))


class Forked(subprocess.Popen):
  """A process of a server, as if it had been started here, with its output in pipes."""

  def __init__(self, server: Server, module: str, arguments: list[str], env: dict[str, str]):
    self.args, self.stdin, self.returncode = arguments, None, None
    self._server, self._child_created, self._communication_started = server, True, False
    self._input, self._waitpid_lock, self._sigint_wait_secs = None, threading.Lock(), 0.25
    self.text_mode = self.universal_newlines = True
    pipes = os.pipe(), os.pipe()
    self.stdout, self.stderr = (open(reading, encoding='utf-8') for reading, _ in pipes)
    try:
      request = {'module': module, 'arguments': arguments, 'env': env}
      self.pid = server.ask(request, tuple(w for _, w in pipes))
    finally:
      for _, writing in pipes:
        os.close(writing)

  def _internal_poll(self, *_, **__):
    with self._waitpid_lock:
      if self.returncode is None:
        self.returncode = self._server.ask({'ended': self.pid})
    return self.returncode

  def _wait(self, timeout):
    end = time.monotonic() + (float('inf') if timeout is None else timeout)
    while self._internal_poll() is None:
      if time.monotonic() >= end:
        raise subprocess.TimeoutExpired(self.args, timeout)
      time.sleep(0.01)
    return self.returncode


def early(env: dict[str, str]) -> dict[str, str]:
  """What of an environment imports may depend on."""
  return {k: v for k, v in env.items() if k not in LATE and not k.startswith('PYTEST_')}


@functools.cache
def server(number: int) -> Server:
  """One of two, started when it is first needed."""
  return Server()


def start(module: str, arguments: list[str], env: dict[str, str]) -> subprocess.Popen | None:
  """`python -u -m MODULE ...`; None where the environment has to be there from the start."""
  one = server(int(env.get('PROCESS_INDEX', 0)) % 2)
  return Forked(one, module, arguments, env) if early(env) == one.environment else None


def serve(descriptor: int) -> str:
  """Answer until the other end is closed; the module to run in a process that was forked."""
  with socket.socket(fileno=descriptor) as pipe:
    pipe.set_inheritable(False)
    while True:
      request, descriptors, *_ = socket.recv_fds(pipe, LARGEST, 2)
      if not request:
        return ''
      request = json.loads(request)
      if 'ended' in request:
        process, status = os.waitpid(request['ended'], os.WNOHANG)
        pipe.send(json.dumps(os.waitstatus_to_exitcode(status) if process else None).encode())
        continue
      process = os.fork()
      if not process:
        break
      for own in descriptors:
        os.close(own)
      pipe.send(json.dumps(process).encode())
  for number, name in enumerate(('stdout', 'stderr'), 1):
    os.dup2(descriptors[number - 1], number)
    os.close(descriptors[number - 1])
    raw = open(number, 'wb', buffering=0, closefd=False)
    setattr(sys, name, io.TextIOWrapper(raw, encoding='utf-8', write_through=True))
  os.environ.clear()
  os.environ.update(request['env'])
  sys.argv = [request['module'], *request['arguments']]
  return request['module']


if __name__ == '__main__':
  for module in ('__main__', 'build', 'cli.main', 'cli.train', 'train.loop'):
    importlib.import_module(f'diffusion_jax.{module}')

  assert threading.active_count() == 1
  signal.signal(signal.SIGINT, signal.default_int_handler)
  gc.collect()
  gc.freeze()  # Else a look for garbage would copy every page.
  if wanted := serve(int(sys.argv[1])):
    runpy.run_module(wanted, run_name='__main__', alter_sys=True)
