"""The processes of a job meet once before jax joins them, so that errors can be told in words."""

import contextlib
import errno
import os
import socket
import time

from diffusion_jax.errors import UserError

HELLO = 'diffusion_jax'
GO = b'go\n'


def roll_call(coordinator: str, processes: int, index: int, timeout: float) -> int:
  """Returns once all processes are there; the port is free again when it does.

  Process 0 listens at the coordinator's port, the others tell it their number and wait for its
  word.

  Args:
    coordinator: HOST:PORT of process 0.
    timeout: seconds to wait for the others.

  Returns:
    Seconds that are left of `timeout`.

  Raises:
    UserError: not all came in time, two have the same number, or they count differently.
  """
  host, _, port = coordinator.rpartition(':')
  end = time.monotonic() + timeout
  if index == 0:
    _Host(coordinator, int(port), processes, timeout).wait(end)
  else:
    _answer(host.strip('[]'), int(port), processes, index, timeout)
  return int(end - time.monotonic())


class _Host:
  """Process 0: takes down who has come."""

  def __init__(self, coordinator: str, port: int, processes: int, timeout: float):
    self.coordinator, self.processes, self.timeout = coordinator, processes, timeout
    self.present: dict[int, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
      self.server = socket.create_server(
        ('', port), family=family, dualstack_ipv6=both, backlog=max(64, processes)
      )
    except OSError as error:
      if error.errno not in (errno.EADDRINUSE, errno.EACCES):
        raise
      raise UserError(
        f'process 0 cannot listen at port {port} ({os.strerror(error.errno)}); choose another by '
        'COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, or end the program that uses it.'
      ) from error

  def wait(self, end: float) -> None:
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.server)
      try:
        while len(self.present) < self.processes - 1:
          self.server.settimeout(max(0.001, end - time.monotonic()))
          self._admit(stack.enter_context(self.server.accept()[0]))
          self.present = {i: c for i, c in self.present.items() if not _has_left(c)}
      except TimeoutError:
        self._refuse(
          f'process 0 waited {self.timeout:g} s at {self.coordinator}, but {self._missing()} of '
          f'{self.processes} did not come; see what became of them, or give more time by '
          'COORDINATOR_TIMEOUT_SECONDS.'
        )
      for connection in self.present.values():
        with contextlib.suppress(OSError):  # Gone in this moment: jax will miss it.
          connection.sendall(GO)

  def _admit(self, connection: socket.socket) -> None:
    """Enters a process; others who come by, such as a health check, are not counted."""
    connection.settimeout(2)
    try:
      words = connection.recv(200).decode('ascii').split()  # One line, so one packet.
    except (OSError, UnicodeDecodeError):
      return
    if len(words) != 3 or words[0] != HELLO or not (words[1] + words[2]).isdigit():
      return
    processes, index = int(words[1]), int(words[2])
    if processes != self.processes:
      self._refuse(
        f'process {index} was told of {processes} processes and process 0 of {self.processes}; '
        'start all with the same number.', connection
      )
    if index in self.present and not _has_left(self.present[index]):
      self._refuse(f'two processes have the number {index}; give each its own.', connection)
    self.present[index] = connection

  def _missing(self) -> str:
    missing = [str(i) for i in range(1, self.processes) if i not in self.present]
    more = f' and {len(missing) - 8} more' if len(missing) > 8 else ''
    return f'process {", ".join(missing[:8])}{more}'

  def _refuse(self, message: str, *others: socket.socket) -> None:
    for connection in (*self.present.values(), *others):
      with contextlib.suppress(OSError):
        connection.sendall(f'{message}\n'.encode())
    raise UserError(message)


def _has_left(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return connection.recv(1, socket.MSG_PEEK) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(2)


def _answer(host: str, port: int, processes: int, index: int, timeout: float) -> None:
  """Another process: tells its number until process 0 lets it go on."""
  end, pause, reason = time.monotonic() + timeout, 0.05, 'nobody answers'
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 10)) as connection:
        connection.sendall(f'{HELLO} {processes} {index}\n'.encode())
        # Process 0 speaks last: a little later than it stops to wait, so that its word arrives.
        connection.settimeout(left + 2)
        reply = connection.makefile('rb').readline(2000)
    except OSError as error:
      reason = error.strerror or str(error)
    else:
      if reply == GO:
        return
      text = reply.decode('utf-8', 'replace').strip()
      if text.startswith(('process ', 'two processes ')):
        raise UserError(text)
      reason = 'another program answers there' if reply else 'it hung up'
    time.sleep(min(pause, max(0, end - time.monotonic())))
    pause = min(2, pause * 1.5)
  raise UserError(
    f'process {index} of {processes} could not reach process 0 at {host}:{port} within '
    f'{timeout:g} s ({reason}); see that process 0 runs and that this port of its host is open, '
    'or give more time by COORDINATOR_TIMEOUT_SECONDS.'
  )
