"""What surrounds training, so that no end of it goes untold: signals, lost processes, stalls."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.io.status import Status
from diffusion_jax.parallel.peers import Peers
from diffusion_jax.parallel.pulse import listening
from diffusion_jax.train.config import SafetyConfig
from diffusion_jax.train.diverged import Diverged
from diffusion_jax.train.stop import StopRequest
from diffusion_jax.train.watchdog import Watchdog

TRY_AGAIN = 75
"""Exit code of a process that left because another was lost or because nothing moved any more."""

_OF_A_PEER = ('gloo', 'nccl', 'connection', 'socket', 'unavailable', 'deadline', 'coordination',
              'aborted', 'heartbeat', 'barrier')


class Safety:
  """The status file, the bonds between processes, the watchdog and stop requests of one start.

  facts: a function that says how far things are, for the status file.
  """

  def __init__(self, directory: RunDirectory, config: SafetyConfig):
    self.facts: Callable[[], dict[str, Any]] = dict
    self._index, self._count = jax.process_index(), jax.process_count()
    self._status = Status(directory, self._index, self._count)
    self.before = self._status.before()
    """The last word of the start before this one."""
    self._told = 0.0
    self.peers = Peers(config.peer_timeout_seconds, self._lost)
    self.stop = StopRequest(self.peers)
    self.watchdog = Watchdog(
      config.step_timeout_seconds, directory=directory.path, on_stall=self._stalled,
      exit_code=TRY_AGAIN,
    )

  def tell(self, state: str, *, now: bool = True, **more: Any) -> None:
    """Writes how things stand; without `now` no more than once a second."""
    if now or time.monotonic() - self._told > 1:
      self._told = time.monotonic()
      self._status(state, **self.facts(), **more)

  def check(self) -> None:
    """A sign of life; raises Stopping where all processes stop."""
    self.watchdog.beat()
    self.stop.check()

  @contextmanager
  def watching(self):
    """Reports whatever ends what is done within, then lets it end."""
    try:
      with self.stop, listening(self.check):
        yield
    except BaseException as error:
      self._fail(error)
      raise
    finally:
      self.watchdog.close()
      self.peers.close()
      self._status.close()

  def _fail(self, error: BaseException) -> None:
    message = f'{type(error).__name__}: {error}'
    if self._count > 1 and any(word in message.lower() for word in _OF_A_PEER):
      # Most likely another process is gone; then `_lost` leaves from its thread meanwhile.
      with self.watchdog.allow(0, 'word of the other processes'):
        self.peers.confirm_gone()
    state, code = _verdict(error)
    if state == 'interrupted':
      message = 'left at once by a second signal, without saving'
    self._status(state, everyone=True, **self.facts(), message=message[:500])
    if self._count > 1:
      # Leaving in order would wait for processes that wait for this one.
      if isinstance(error, UserError | Diverged):
        print(f'diffusion_jax train: {error}', file=sys.stderr)
      else:
        traceback.print_exc()
      self.peers.leave(state)
      _leave_at_once(code)

  def _lost(self, sentence: str) -> None:
    _, why = self.peers.gone
    if not why:
      message = f'{sentence}; start again to go on from the last checkpoint'
      self._status('peer_lost', everyone=True, **self.facts(), message=message)
    print(f'diffusion_jax: process {self._index} leaves: {sentence}', file=sys.stderr)
    _leave_at_once(TRY_AGAIN if why in ('', 'stalled') else 1)

  def _stalled(self, message: str) -> None:
    self._status('stalled', everyone=True, **self.facts(), message=message)
    last_word = threading.Thread(target=self.peers.leave, args=('stalled',), daemon=True)
    last_word.start()
    last_word.join(10)  # The coordinator may stand still, too.


def _verdict(error: BaseException) -> tuple[str, int]:
  """(state, exit code) of a run that this error ends."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted', 130
  if isinstance(error, Diverged):
    return 'diverged', 1
  return 'failed', 2 if isinstance(error, UserError) else 1


def _leave_at_once(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
