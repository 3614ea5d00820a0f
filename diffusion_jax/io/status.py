"""status.json: how a run stands, for launchers, reports and people."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.io import keeper
from diffusion_jax.io.run_directory import RunDirectory

GOES_ON = ('starting', 'compiling', 'training', 'sampling', 'evaluating', 'saving', 'finishing')
RETRY = (*GOES_ON, 'interrupted', 'peer_lost', 'stalled')
"""States after which the same command goes on; after the others it would do nothing or fail."""


class Status:
  """Writes status.json, and sees to it that it is true also after a sudden end.

  Keys: state; retry, whether the same command again would go on; message; step, total_steps,
  seconds (spent on the run over all its starts), pid, host, updated (seconds since 1970) and what
  the caller adds.

  Process 0 writes while things go on, and whichever process fails writes why. Every process has a
  keeper beside it (`io.keeper`), which writes 'killed' when the process ends without a last word.
  """

  def __init__(self, directory: RunDirectory, process: int, processes: int):
    self._directory, self._main = directory, process == 0
    self._what = f'process {process} of {processes}' if processes > 1 else 'the process'
    self._keeper: subprocess.Popen | None = None
    self._lock = threading.Lock()
    self.final = False

  def before(self) -> dict[str, Any]:
    """The last word of the start before this one, empty if there is none."""
    try:
      return self._directory.read_json('status.json')
    except UserError:
      return {}

  def __call__(self, state: str, *, everyone: bool = False, **values: Any) -> None:
    """Notes the state; after a final one nothing more is written.

    Args:
      everyone: any process writes it, not only process 0.
    """
    with self._lock:
      if self.final:
        return
      self.final = state in keeper.FINAL
      record = {
        'state': state, 'retry': state in RETRY, 'message': '', **values, 'pid': os.getpid(),
        'host': socket.gethostname(), 'updated': time.time(),
      }
      # The keeper hears of what goes on before the file shows it, and of the end after it: whenever
      # a kill comes, what the keeper then writes is not older than the file, and never missing.
      if not self.final:
        self._tell_keeper(record)
      if self._main or everyone:
        with contextlib.suppress(OSError):  # A full disk must not end what it can only describe.
          self._directory.write_json('status.json', record)
      if self.final:
        self._tell_keeper(record)

  def _tell_keeper(self, record: dict[str, Any]) -> None:
    if self._keeper is None:
      # In a session of its own: a signal to the whole group must not reach it.
      self._keeper = subprocess.Popen(
        [sys.executable, '-S', '-E', keeper.__file__, str(self._directory.path / 'status.json')],
        stdin=subprocess.PIPE, text=True, start_new_session=True,
      )
    with contextlib.suppress(OSError):  # Someone has killed it; the run is worth more.
      self._keeper.stdin.write(json.dumps({**record, 'what': self._what}) + '\n')
      self._keeper.stdin.flush()

  def close(self) -> None:
    """Lets the keeper go. Without a final state it writes that the run was killed."""
    if self._keeper is not None:
      with contextlib.suppress(OSError):
        self._keeper.stdin.close()
      self._keeper.wait(10)
      self._keeper = None
