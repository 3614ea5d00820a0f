"""Writes one checkpoint at a time in the background, all of it or nothing.

The files are written to STEP.orbax-checkpoint-tmp and renamed to STEP at the end. Orbax's handlers
write the arrays. Its Checkpointer does not serve here: where one process fails to write, the others
would wait at its barriers for many minutes; here the one tells them.
"""

import asyncio
import concurrent.futures
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.checkpoint import record
from diffusion_jax.checkpoint.digests import local_digests
from diffusion_jax.checkpoint.record import Damaged, quarantine, write_manifest
from diffusion_jax.checkpoint.restoring import read_step_alone, sentence
from diffusion_jax.parallel.processes import agree

TEMPORARY = '.orbax-checkpoint-tmp'
MARGIN_BYTES, MARGIN_BYTES_A_LEAF = 1 << 20, 2048
"""Room for what is not array data: metadata, the record and the manifest."""
PASSING = tuple(
  getattr(errno, name) for name in (
    'ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EIO', 'EACCES', 'EPERM', 'ESTALE', 'ETIMEDOUT', 'EBUSY',
    'ENOTCONN', 'EHOSTDOWN', 'EHOSTUNREACH', 'EAGAIN', 'ENOMEM', 'EMFILE', 'ENFILE',
  ) if hasattr(errno, name)
)
"""Errors of storage after which a write may succeed later."""

_numbers = itertools.count()


class NotSaved(Exception):
  """A checkpoint could not be written; the message says why."""


class Saving:
  """Saves into `directory`, one step after the other."""

  def __init__(self, directory: Path):
    self.directory = directory
    self._name = f'saving_{next(_numbers)}'  # The same in all processes, as paths need not be.
    # One thread: it starts the next save only when the one before is on disk or has failed.
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
    self._handlers: dict[str, ocp.StandardCheckpointHandler] = {}
    self._running: concurrent.futures.Future | None = None

  @property
  def busy(self) -> bool:
    """Whether a save is under way or its outcome not yet collected."""
    return self._running is not None

  @property
  def done(self) -> bool:
    """Whether there is an outcome to collect; asks nothing but a flag in memory."""
    return self._running is not None and self._running.done()

  def collect(self) -> None:
    """Waits for the save under way, if any.

    Raises:
      NotSaved: it failed, here or in another process.
    """
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def start(
    self, step: int, parts: dict[str, Any], data: Any, then: Callable[[], None],
    say: Callable[[str], None],
  ) -> bool:
    """Copies the arrays to the host and starts to write; no save may be under way.

    Args:
      parts: item -> pytree of arrays.
      then: is called by process 0 in the background once the step is on disk.
      say: is told of what was in the way and has been moved.

    Returns:
      False where the step is on disk already.

    Raises:
      NotSaved: there is no room, or no folder can be made; on all processes alike.
    """
    folder = self.directory / f'{step}{TEMPORARY}'
    shares = {item: local_digests(tree) for item, tree in parts.items()}
    if self._prepare(step, folder, parts, say):
      return False
    arrays = {item: record.describe(tree) for item, tree in parts.items()}
    problem, writes = '', []
    try:  # In the thread, for a notebook runs an event loop of its own in this one.
      writes = self._pool.submit(asyncio.run, self._begin(folder, parts)).result()
    except Exception as error:  # Of many kinds, and the peers must hear of all.
      problem = reason(error)

    def finish() -> None:
      self._write(folder, step, writes, shares, arrays, data, problem)
      self._commit(folder, self.directory / str(step), list(parts))
      if jax.process_index() == 0:
        then()

    self._running = self._pool.submit(finish)
    return True

  def _prepare(self, step: int, folder: Path, parts: dict[str, Any], say) -> bool:
    """Makes the folders where there is room; True where the step is there already."""
    problem = ''
    try:
      if jax.process_index() == 0 and self._have(step, say):
        problem = 'have'
      else:
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
          remove_leftovers(self.directory)
        problem = _lack_of_room(self.directory, parts)
        if jax.process_index() == 0 and not problem:
          for name in (*parts, record.RECORD):
            (folder / name).mkdir(parents=True)
    except OSError as error:
      problem = reason(error)
    answers = agree(f'{self._name}/preparing', problem)
    if answers[0] == 'have':
      return True
    self._stop_where(answers, folder)
    return False

  def _have(self, step: int, say: Callable[[str], None]) -> bool:
    """Whether the step is there; what stands in its place and is no such checkpoint is moved."""
    folder = self.directory / str(step)
    if not os.path.lexists(folder):
      return False
    try:
      read_step_alone(folder)
    except Damaged as error:
      target = quarantine(self.directory, step)
      say(f'{folder} is no checkpoint of that step ({error}); it was moved to {target}.')
      return False
    return True

  async def _begin(self, folder: Path, parts: dict[str, Any]) -> list:
    writes = []
    for item, tree in parts.items():
      handler = self._handlers.setdefault(item, ocp.StandardCheckpointHandler())
      args = ocp.args.StandardSave(tree)
      writes += await handler.async_save(epath.Path(folder / item), args=args) or []
    return writes

  def _write(self, folder, step, writes, shares, arrays, data, problem) -> None:
    for write in writes:  # All of them, for the folder may only go when nobody writes into it.
      try:
        write.result()
      except Exception as error:
        problem = problem or reason(error)
    try:
      if not problem:
        record.write_shares(folder, {item: fetch() for item, fetch in shares.items()})
        if jax.process_index() == 0:
          record.write_record(folder, step, arrays, data)
    except Exception as error:
      problem = reason(error)
    self._stop_where(agree(f'{self._name}/written', problem), folder)

  def _commit(self, folder: Path, target: Path, items: list[str]) -> None:
    problem = ''
    if jax.process_index() == 0:
      try:
        for item in items:
          self._handlers[item].finalize(epath.Path(folder / item))
        write_manifest(folder)
        os.rename(folder, target)
      except Exception as error:
        problem = reason(error)
    self._stop_where(agree(f'{self._name}/committed', problem), folder)

  def _stop_where(self, problems: list[str], folder: Path) -> None:
    problem = next((problem for problem in problems if problem), '')
    if problem:
      if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
      raise NotSaved(problem)

  def close(self) -> None:
    """Frees the thread; a save under way is finished first."""
    self._pool.shutdown()
    for handler in self._handlers.values():
      handler.close()


def remove_leftovers(directory: Path) -> None:
  """Removes what saves left that were cut off or failed; none may be under way."""
  for path in directory.glob(f'*{TEMPORARY}*'):
    shutil.rmtree(path, ignore_errors=True)


def reason(error: BaseException) -> str:
  """Why something could not be written, in few words."""
  text = str(error)
  if getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in text:
    return 'the disk is full'
  short = sentence(error)
  # Libraries quote the system's words behind long paths.
  named = next((word for word in map(os.strerror, PASSING) if word in text), '')
  return short if named in short else f'{named}: {short}'


def of_storage(error: BaseException) -> bool:
  """Whether an error says that something cannot be written, rather than that it is wrong.

  Libraries in other languages have kinds of their own, which quote the number of the system's.
  """
  return isinstance(error, OSError) or bool(re.search(r'os error \d+|No space left', str(error)))


def may_pass(trouble: str) -> bool:
  """Whether what keeps something from being written is of a kind that ends by itself or by making
  room; `trouble` quotes the reason, which may have come from another process."""
  words = ('the disk is full', 'did not agree', *map(os.strerror, PASSING))
  return any(word in trouble for word in words)


def _lack_of_room(directory: Path, parts: dict[str, Any]) -> str:
  """'' where all of the arrays fit, whoever writes them, or else a sentence."""
  leaves = jax.tree.leaves(parts)
  needed = sum(leaf.nbytes for leaf in leaves) * 11 // 10
  needed += MARGIN_BYTES + MARGIN_BYTES_A_LEAF * len(leaves)
  free = shutil.disk_usage(directory).free
  if free >= needed:
    return ''
  return f'the disk is full: {free / 1e6:,.1f} MB are free, {needed / 1e6:,.1f} MB are needed'
