"""Atomic writes of one checkpoint at a time, in the background.

Files go to STEP.orbax-checkpoint-tmp, renamed to STEP at the end, by Orbax's handlers. In its
Checkpointer processes wait many minutes at a barrier for one that failed to write; here it tells
them.
"""

import asyncio
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.checkpoint import record
from diffusion_jax.checkpoint.digests import local_digests
from diffusion_jax.checkpoint.record import Damaged
from diffusion_jax.files import first_line
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
  """A checkpoint was not written; the message says why."""


class Saving:
  """Saves into `directory`, one step after the other."""

  def __init__(self, directory: Path, say: Callable[[str], None]):
    """`say` takes a line about what was in the way of a step and has been moved."""
    self.directory, self._say = directory, say
    self._name = f'saving_{next(_numbers)}'  # The same in all processes, as paths need not be.
    # One thread: it starts the next save only when the one before is on disk or has failed.
    self._pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
    self._handlers: dict[str, ocp.StandardCheckpointHandler] = {}

  def start(
    self, step: int, parts: dict[str, Any], data: Any, then: Callable[[], None]
  ) -> Future | None:
    """Copy the arrays to the host and start to write; no save may be under way.

    A future, NotSaved where a process fails; None where the step is on disk already. parts: item ->
    pytree of arrays. then: called by process 0 in the background once the step is on disk.
    NotSaved: no room, or no folder can be made; on all processes alike.
    """
    folder = self.directory / f'{step}{TEMPORARY}'
    digests = {item: local_digests(tree) for item, tree in parts.items()}
    if self._prepare(step, folder, parts):
      return None
    arrays = {item: record.describe(tree) for item, tree in parts.items()}
    writes: list = []
    # In the thread, for a notebook runs an event loop of its own in this one.
    begin = lambda: writes.extend(asyncio.run(self._begin(folder, parts)))
    problem = self._pool.submit(_tried, begin).result()

    def write() -> None:
      record.write_digests(folder, {item: fetch() for item, fetch in digests.items()})
      if jax.process_index() == 0:
        record.write_record(folder, step, arrays, data)

    def commit() -> None:
      for item in parts:
        self._handlers[item].finalize(epath.Path(folder / item))
      record.write_manifest(folder)
      os.rename(folder, self.directory / str(step))

    def finish() -> None:
      # All of them, for the folder may only go when nobody writes into it.
      problems = [problem, *(_tried(one.result) for one in writes)]
      self._agree('written', next(filter(None, problems), '') or _tried(write), folder)
      self._agree('committed', _tried(commit) if jax.process_index() == 0 else '', folder)
      if jax.process_index() == 0:
        then()

    return self._pool.submit(finish)

  def _prepare(self, step: int, folder: Path, parts: dict[str, Any]) -> bool:
    """Make the folders where there is room; True where the step is there already."""
    main = jax.process_index() == 0
    try:
      if main and self._have(step):
        problem = 'have'
      else:
        self.directory.mkdir(parents=True, exist_ok=True)
        if main:
          remove_leftovers(self.directory)
        problem = _lack_of_room(self.directory, parts)
        if main and not problem:
          for name in (*parts, record.RECORD):
            (folder / name).mkdir(parents=True)
    except OSError as error:
      problem = reason(error)
    return self._agree('preparing', problem, folder) == 'have'

  def _have(self, step: int) -> bool:
    """Say whether the step is there; what stands in its place and is none is moved."""
    folder = self.directory / str(step)
    if not os.path.lexists(folder):
      return False
    try:
      record.check_manifest(folder, (record.RECORD,))
      record.read_record(folder)
    except Damaged as error:
      target = record.quarantine(self.directory, step)
      self._say(f'{folder} is no checkpoint of that step ({error}); it was moved to {target}.')
      return False
    return True

  async def _begin(self, folder: Path, parts: dict[str, Any]) -> list:
    writes = []
    for item, tree in parts.items():
      handler = self._handlers.setdefault(item, ocp.StandardCheckpointHandler())
      args = ocp.args.StandardSave(tree)
      writes += await handler.async_save(epath.Path(folder / item), args=args) or []
    return writes

  def _agree(self, stage: str, problem: str, folder: Path) -> str:
    """Return process 0's answer where it is 'have', '' where none has a problem."""
    problems = agree(f'{self._name}/{stage}', problem)
    if problems[0] == 'have':
      return 'have'
    if problem := next(filter(None, problems), ''):
      if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
      raise NotSaved(problem)
    return ''

  def close(self) -> None:
    """Free the thread; a save under way is finished first."""
    self._pool.shutdown()
    for handler in self._handlers.values():
      handler.close()


def _tried(work: Callable[[], Any]) -> str:
  """Return why `work` failed, '' where it did not."""
  try:
    work()
  except Exception as error:  # Of Orbax and its storage, of many kinds; peers must hear of all.
    return reason(error)
  return ''


def remove_leftovers(directory: Path) -> None:
  """Remove what saves left that were cut off or failed; none may be under way."""
  for path in directory.glob(f'*{TEMPORARY}*'):
    shutil.rmtree(path, ignore_errors=True)


def reason(error: BaseException) -> str:
  """Return why something could not be written, in few words."""
  text = str(error)
  if getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in text:
    return 'the disk is full'
  short = first_line(error)
  # Libraries quote the system's words behind long paths.
  named = next((word for word in map(os.strerror, PASSING) if word in text), '')
  return short if named in short else f'{named}: {short}'


def is_storage_error(error: BaseException) -> bool:
  """True for an error of storage; libraries in other languages quote the system's error number."""
  return isinstance(error, OSError) or bool(re.search(r'os error \d+|No space left', str(error)))


def may_pass(problem: str) -> bool:
  """Tell whether what keeps something from being written, by its `reason`, may end by itself."""
  words = ('the disk is full', 'did not agree', *map(os.strerror, PASSING))
  return any(word in problem for word in words)


def _lack_of_room(directory: Path, parts: dict[str, Any]) -> str:
  """Return a sentence where not all arrays fit, whoever writes them; '' where they do."""
  leaves = jax.tree.leaves(parts)
  needed = sum(leaf.nbytes for leaf in leaves) * 11 // 10
  needed += MARGIN_BYTES + MARGIN_BYTES_A_LEAF * len(leaves)
  free = shutil.disk_usage(directory).free
  if free >= needed:
    return ''
  return f'the disk is full: {free / 1e6:,.1f} MB are free, {needed / 1e6:,.1f} MB are needed'
