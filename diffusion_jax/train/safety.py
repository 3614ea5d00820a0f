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
from diffusion_jax.io.start import Start
from diffusion_jax.parallel.peers import Peers
from diffusion_jax.parallel.pulse import listening
from diffusion_jax.train.config import SafetyConfig
from diffusion_jax.train.diverged import Diverged
from diffusion_jax.train.stop import StopRequest
from diffusion_jax.train.watchdog import Watchdog

TRY_AGAIN = 75
"""Exit code of a process that left because another was lost, because nothing moved any more, or
because the last checkpoint or the model could not be written."""

_OF_A_PEER = ('gloo', 'nccl', 'connection', 'socket', 'unavailable', 'deadline', 'coordination',
              'aborted', 'heartbeat', 'barrier')


class Safety:
  """The status file, the bonds between processes, the watchdog and stop requests of one start.

  facts: a function that says how far things are, for the status file.
  training: whether training has begun, so that what ends it now is more than a refused start.
  note: is added to the message when an error ends the run.
  """

  def __init__(self, start: Start, config: SafetyConfig):
    self.start, self.config, self._status = start, config, start.status
    self.facts: Callable[[], dict[str, Any]] = self._status.facts_before
    self.training, self.note = False, ''
    self._index, self._count = jax.process_index(), jax.process_count()
    self._told = 0.0
    if start.lock is not None:
      start.lock.on_lost = self._replaced
    self.peers = Peers(config.peer_timeout_seconds, self._lost)
    self.stop = StopRequest(self.peers)
    self.watchdog = Watchdog(
      config.step_timeout_seconds, directory=start.directory.path, on_stall=self._stalled,
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
    if self.start.lock is not None:
      self.start.lock.check()
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

  def _fail(self, error: BaseException) -> None:
    message = f'{type(error).__name__}: {error}'
    if self._count > 1 and any(word in message.lower() for word in _OF_A_PEER):
      # Most likely another process is gone; then `_lost` leaves from its thread meanwhile.
      with self.watchdog.allow(0, 'word of the other processes'):
        self.peers.confirm_gone()
    state, code = _verdict(error)
    if state == 'interrupted' and self.training:
      message = 'left at once by a second signal, without saving'
    if self.training:
      message = f'{message[:500]}{self.note}'
      self._status(state, everyone=True, **self.facts(), message=message)
    else:
      self.start.end(error)
    if self._count > 1:
      # Leaving in order would wait for processes that wait for this one.
      if isinstance(error, UserError | Diverged):
        print(f'diffusion_jax train: {error}', file=sys.stderr)
      else:
        traceback.print_exc()
      self.peers.leave(state)
      self._leave_at_once(code)

  def _lost(self, sentence: str) -> None:
    _, why = self.peers.gone
    if not why:
      message = f'{sentence}; start again to go on from the last checkpoint'
      self._status('peer_lost', everyone=True, **self.facts(), message=message)
    print(f'diffusion_jax: process {self._index} leaves: {sentence}', file=sys.stderr)
    self._leave_at_once(TRY_AGAIN if why in ('', 'stalled') else 1)

  def _replaced(self, sentence: str) -> None:
    """Another start has the workdir now: from here on every file in it is that one's."""
    self._status.silence()
    print(f'diffusion_jax train: {sentence}; leaving', file=sys.stderr)
    self.peers.leave('replaced')
    self._leave_at_once(1)

  def _leave_at_once(self, code: int) -> None:
    self.start.release_at_once()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _stalled(self, message: str) -> None:
    self._status('stalled', everyone=True, **self.facts(), message=message)
    last_word = threading.Thread(target=self.peers.leave, args=('stalled',), daemon=True)
    last_word.start()
    last_word.join(10)  # The coordinator may stand still, too.
    self.start.release_at_once()


def _verdict(error: BaseException) -> tuple[str, int]:
  """(state, exit code) of a run that this error ends."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted', 130
  if isinstance(error, Diverged):
    return 'diverged', 1
  return 'failed', 2 if isinstance(error, UserError) else 1
