"""Checkpoints of a whole training state: saved in the background, verified when read.

No fault of storage may cost a run: a failed save is reported and retried, a damaged checkpoint
moved aside and the one before it used. Orbax's manager is not used: its barriers wait for processes
that have failed, and its policies know no sample counts.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.checkpoint import record
from diffusion_jax.checkpoint.record import Damaged, read_step
from diffusion_jax.checkpoint.saving import NotSaved, Saving, reason, remove_leftovers
from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, read_object, reading, say, set_aside_damaged
from diffusion_jax.parallel.processes import agree, in_step

ITEMS = ('params', 'opt_state', 'ema', 'rest')
"""Parts of a state that are stored apart, so that sampling reads only the parameters."""
SCORES, DELETING = 'scores.json', '.deleting'
STEP = re.compile(r'0|[1-9][0-9]{0,17}')
"""A step as it is written here, which other digits, signs, zeros and spaces are not."""
RETRY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Keep:
  """The newest `last`, multiples of every_steps (0: none), and the best.

  best: a metric of the evaluation, or ''. best_is: lowest, highest.
  """

  last: int = 2
  every_steps: int = 0
  best: str = ''
  best_is: str = 'lowest'


def steps_to_keep(
  steps: Iterable[int], scores: Mapping[int, float], keep: Keep,
  samples: Mapping[int, float] | None = None,
) -> set[int]:
  """The steps to keep, of those on disk.

  scores: step -> value of the metric `keep.best`; steps may be missing. samples: step -> its number
  of samples; values of different numbers do not compare (FID falls as they grow), so the best of
  each number stays.
  """
  steps, samples = sorted(steps), samples or {}
  stay = set(steps[-keep.last :])
  if keep.every_steps:
    stay |= {step for step in steps if step % keep.every_steps == 0}
  if keep.best:
    sign = 1 if keep.best_is == 'highest' else -1
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    scored.sort(key=lambda step: (sign * scores[step], step))  # The newest of equal ones is last.
    stay |= set({samples.get(step): step for step in scored}.values())
  return stay


class Scores:
  """`directory`/scores.json: {step: {metric: value}}. Only process 0 writes."""

  def __init__(self, directory: Path, say: Callable[[str], None]):
    self._file, self._say = directory / SCORES, say
    self._lock = threading.Lock()  # Steps are pruned in the thread that saves.
    self._values: dict[int, dict[str, float]] = {}
    if not os.path.lexists(self._file):
      return
    try:
      with reading(self._file, remedy='scores of old checkpoints are forgotten'):
        self._values = {
          int(step): {name: float(value) for name, value in values.items()}
          for step, values in read_object(self._file).items()
        }
    except UserError as error:
      self._say(str(error))

  def of(self, metric: str) -> dict[int, float]:
    """Return {step: value} of a metric, of the steps that have one."""
    with self._lock:
      return {step: v[metric] for step, v in self._values.items() if metric in v}

  def add(self, step: int, values: dict[str, float]) -> None:
    """Record values at a step; errors of storage are only reported."""
    with self._lock:
      known = self._values.setdefault(step, {})
      known |= {name: float(value) for name, value in values.items()}
      text = json.dumps(self._values, indent=1)
    if jax.process_index() == 0:
      try:
        with atomic_write(self._file) as file:
          file.write(text.encode())
      except OSError as error:
        self._say(f'{self._file} cannot be written ({error}).')


class Checkpoints:
  """The checkpoints of one run, `directory`/STEP. All processes save and restore together.

  error: why the last save failed, a sentence; '' once one has succeeded again.
  """

  def __init__(
    self, directory: Path, keep: Keep = Keep(), *, read_only: bool = False,
    say: Callable[[str], None] = lambda text: say(text, ''), retry_seconds: float = RETRY_SECONDS,
  ):
    """With read_only nothing is ever written, moved or deleted; otherwise leftovers of saves and
    deletions that were cut off are removed at once. `say` is called by process 0 alone."""
    self.directory = Path(directory).absolute()
    self.keep, self.read_only, self.retry_seconds = keep, read_only, retry_seconds
    self.error = ''
    self._main = jax.process_index() == 0
    self._say = say if self._main else lambda text: None
    self._failed_at: float | None = None
    self._step, self._running = -1, None  # The save under way, until its outcome is noted.
    if not read_only:
      self._tidy_up()
    self._scores = Scores(self.directory, self._say)
    self._saving = Saving(self.directory, self._say)

  def _tidy_up(self) -> None:
    if os.path.lexists(self.directory) and not self.directory.is_dir():
      raise UserError(f'{self.directory} is not a folder; move it out of the way.')
    if self._main:
      remove_leftovers(self.directory)
      with contextlib.suppress(OSError):  # What cannot be read or removed shows when it is needed.
        set_aside_damaged(self.directory / SCORES, self._say)
        for path in self.directory.glob(f'*{DELETING}'):
          _remove(path)

  def steps(self) -> list[int]:
    """Return the steps on disk, damaged ones too, in ascending order."""
    if not self.directory.is_dir():
      return []
    names = [entry.name for entry in os.scandir(self.directory) if entry.is_dir()]
    return sorted(int(name) for name in names if STEP.fullmatch(name))

  def latest(self) -> int | None:
    """Return the newest step that looks intact (nothing is read), None when there is none."""
    with contextlib.suppress(OSError):  # What is wrong with the storage shows elsewhere.
      for step in reversed(self.steps()):
        if (self.directory / str(step) / record.MANIFEST).is_file():
          return step
    return None

  def fingerprint(self, step: int) -> str:
    """Return what changes with the content of a checkpoint; '' where there is none."""
    return record.fingerprint(self.directory / str(step))

  def save(self, step: int, state: dict[str, Any], data: Any) -> bool:
    """Start to save; return before the files are written unless a save is still under way.

    True if the step is on disk or on its way. Errors of storage never raise: they are reported and
    kept in `error`, here or in the next `save`, `poll` or `wait`.

    Args:
      state: pytrees of arrays under names of `ITEMS`; empty ones are left out. They may be donated
        as soon as this returns.
      data: JSON-ready position of the data loader in process 0.
    """
    self._collect()
    self._step = step
    try:
      self._running = self._saving.start(step, _present(state), data, self._prune)
    except (NotSaved, TimeoutError) as error:
      self._failed(error)
      return False
    if self._running is None:
      self._succeeded()
    return True

  def poll(self) -> None:
    """Notice what became of a save in the background; costs nothing and waits for nothing."""
    if self._running is not None and self._running.done():
      self._collect()

  def wait(self) -> bool:
    """Block until every save is on disk or has failed; return whether the last one succeeded."""
    self._collect()
    if self._main and not self.read_only:
      self._prune()  # Scores may have come since the save began.
    return not self.error

  def should_retry(self) -> bool:
    """True if the last save failed `retry_seconds` ago or more; for one process to decide."""
    if self._running is not None or self._failed_at is None:
      return False
    return time.monotonic() - self._failed_at >= self.retry_seconds

  def _collect(self) -> None:
    running, self._running = self._running, None
    if running is not None:
      try:
        running.result()
        self._succeeded()
      except (NotSaved, TimeoutError) as error:
        self._failed(error)

  def _succeeded(self) -> None:
    if self.error:
      self._say('checkpoints can be saved again.')
    self.error, self._failed_at = '', None

  def _failed(self, error: Exception) -> None:
    self.error = f'step {self._step} could not be saved ({error}); the run goes on and tries again.'
    self._failed_at = time.monotonic()
    self._say(self.error)

  def scores(self, step: int, values: dict[str, float]) -> None:
    """Note values of evaluation metrics at a saved step, which may change what is kept."""
    self._scores.add(step, values)
    if self.keep.best and self.keep.best not in values:
      self._say(
        f'loop.keep_best is {self.keep.best!r}, which this evaluation does not measure; it '
        f'measures {", ".join(sorted(values)) or "nothing"}.'
      )
    if self._main and self._running is None:
      self._prune()

  def _prune(self) -> None:
    """Delete what the rule does not keep; process 0 alone."""
    try:
      steps = self.steps()
    except OSError as error:
      self._say(f'{self.directory} cannot be read ({reason(error)}); nothing is deleted there.')
      return
    scores, samples = self._scores.of(self.keep.best), self._scores.of('samples')
    stay = steps_to_keep(steps, scores, self.keep, samples)
    for step in sorted(set(steps) - stay):
      folder = self.directory / str(step)
      try:  # Renamed first, so that what is half deleted never passes for a checkpoint.
        _remove(folder.rename(folder.with_name(folder.name + DELETING)))
      except OSError as error:
        self._say(f'the old checkpoint {folder} cannot be deleted ({reason(error)}).')

  def restore(
    self, abstract: dict[str, Any], step: int | None = None, *, everything: bool = True
  ) -> tuple[int, dict[str, Any], Any] | None:
    """(step, state, data) of a checkpoint on the shardings of `abstract`; None without any.

    The mesh and the number of processes may differ from those that saved. UserError: all
    checkpoints are damaged, or of another model.

    Args:
      abstract: shapes with shardings of the items of a state.
      step: None for the newest that is intact: damaged ones are reported and moved to
        `directory`/quarantine.
      everything: whether an item that is saved but not wanted makes it one of another model.
    """
    self._collect()
    read = lambda step: read_step(self.directory / str(step), _present(abstract), everything)
    if step is None:
      found = self._newest(read)
      if found is None:
        return None
      step, trees, data = found
    else:
      try:
        trees, data = read(step)
      except Damaged as error:
        raise UserError(
          f'the checkpoint {self.directory / str(step)} is damaged ({error}); choose another step.'
        ) from error
    return step, {name: trees.get(name, tree) for name, tree in abstract.items()}, data

  def _newest(self, read: Callable[[int], tuple]) -> tuple[int, dict[str, Any], Any] | None:
    steps, moved = json.loads(agree('steps', in_step('listing', self._listed, (UserError,)))[0])
    problem = 'they were found so before'
    for step in reversed(steps):
      try:
        return step, *read(step)
      except Damaged as error:
        problem = str(error)
      self._pass_over(step, problem)
    if not steps and not moved:
      return None
    where = self.directory if steps and self.read_only else self.directory / record.QUARANTINE
    raise UserError(
      f'all checkpoints are damaged ({problem}); they are in {where}: put a copy in their place, '
      'or delete that folder to begin anew.'
    )

  def _listed(self) -> str:
    """Return the steps, and whether any were moved to the quarantine, as JSON."""
    try:
      moved = self.directory / record.QUARANTINE
      return json.dumps([self.steps(), moved.is_dir() and bool(os.listdir(moved))])
    except OSError as error:
      raise UserError(
        f'{self.directory} cannot be read ({reason(error)}); make it readable and start again.'
      ) from error

  def _pass_over(self, step: int, problem: str) -> None:
    damaged = f'the checkpoint {self.directory / str(step)} is damaged ({problem})'
    if self.read_only:
      self._say(f'{damaged}; the one before it is used.')
      return

    def move() -> str:
      try:
        return str(record.quarantine(self.directory, step)) if self._main else ''
      except OSError as error:
        raise UserError(
          f'{damaged} and cannot be moved ({reason(error)}); move it out of the way.'
        ) from error

    self._say(f'{damaged}; it was moved to {in_step("quarantine", move, (UserError,))}.')

  def close(self) -> None:
    """Wait, then free threads."""
    self._collect()
    self._saving.close()


def _remove(folder: Path) -> None:
  """Remove a folder, or a link to one."""
  if folder.is_symlink():
    folder.unlink()
  else:
    shutil.rmtree(folder)


def _present(state: dict[str, Any]) -> dict[str, Any]:
  """Return the items that have any leaves."""
  return {name: state[name] for name in ITEMS if jax.tree.leaves(state.get(name))}
