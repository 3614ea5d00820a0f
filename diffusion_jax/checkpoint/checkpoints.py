"""Checkpoints of a whole training state: saved in the background, verified when read.

Storage fails in many ways and none of them may cost a run: a save that fails is reported and tried
again, a damaged checkpoint is moved aside and the one before it is used.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.checkpoint.keeping import SCORES, Keep, Scores, best_step, comparable, kept
from diffusion_jax.checkpoint.record import (
  MANIFEST,
  QUARANTINE,
  Damaged,
  quarantine,
  quarantined,
  seal,
)
from diffusion_jax.checkpoint.restoring import read_step
from diffusion_jax.checkpoint.saving import NotSaved, Saving, reason, remove_leftovers
from diffusion_jax.errors import UserError
from diffusion_jax.files import set_aside_damaged
from diffusion_jax.parallel.processes import agree, in_step

ITEMS = ('params', 'opt_state', 'ema', 'rest')
"""Parts of a state that are stored apart, so that sampling reads only the parameters."""

DELETING = '.deleting'
STEP = re.compile(r'0|[1-9][0-9]{0,17}')
"""A step as it is written here, which other digits, signs, zeros and spaces are not."""
RETRY_SECONDS = 60.0


def to_stderr(text: str) -> None:
  """One line for people."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)


class Checkpoints:
  """The checkpoints of one run, under `directory`/STEP.

  Whatever saves or restores must be called by all processes together.

  trouble: why the last save failed, a sentence for people; '' once one has succeeded again.
  """

  def __init__(
    self, directory: Path, keep: Keep = Keep(), *, read_only: bool = False,  # noqa: B008
    say: Callable[[str], None] = to_stderr, retry_seconds: float = RETRY_SECONDS,
  ):
    """With read_only nothing is ever written, moved or deleted; otherwise leftovers of saves and
    deletions that were cut off are removed at once. `say` is called by process 0 alone."""
    self.directory = Path(directory).absolute()
    self.keep, self.read_only, self.retry_seconds = keep, read_only, retry_seconds
    self.trouble = ''
    self._say = say if jax.process_index() == 0 else lambda text: None
    self._failed_at: float | None = None
    self._step = -1
    if not read_only:
      self._tidy_up()
    self._scores = Scores(self.directory, self._say)
    self._saving = Saving(self.directory)

  def _tidy_up(self) -> None:
    if os.path.lexists(self.directory) and not self.directory.is_dir():
      raise UserError(f'{self.directory} is not a folder; move it out of the way.')
    if jax.process_index() != 0:
      return
    remove_leftovers(self.directory)
    with contextlib.suppress(OSError):  # What cannot be read or removed shows when it is needed.
      set_aside_damaged(self.directory / SCORES, self._say)
      for path in self.directory.glob(f'*{DELETING}'):
        remove(path)
      self._tell_of_strangers()

  def steps(self) -> list[int]:
    """The steps on disk, damaged ones too, in ascending order."""
    return sorted(int(name) for name in self._folders() if STEP.fullmatch(name))

  def _folders(self) -> list[str]:
    if not self.directory.is_dir():
      return []
    return [entry.name for entry in os.scandir(self.directory) if entry.is_dir()]

  def _tell_of_strangers(self) -> None:
    """Names folders that look like a step to a person; they are left alone."""
    strange = sorted(
      name for name in self._folders()
      if not STEP.fullmatch(name) and name.strip(' +-_.').isnumeric()
    )
    if strange:
      more = f' and {len(strange) - 3} more' if len(strange) > 3 else ''
      self._say(
        f'{self.directory} holds {", ".join(map(ascii, strange[:3]))}{more}, which no step is '
        'written as; it is left alone.'
      )

  def latest(self) -> int | None:
    """The newest step that looks whole (nothing is read), None when there is none."""
    try:
      whole = (s for s in reversed(self.steps()) if (self.directory / str(s) / MANIFEST).is_file())
      return next(whole, None)
    except OSError:  # Only said; what is wrong with the storage shows elsewhere.
      return None

  def seal(self, step: int) -> str:
    """Changes with the content of a checkpoint; '' where there is none."""
    return seal(self.directory / str(step))

  def best(self) -> int | None:
    """The step on disk with the best value of `keep.best`; None when no step has one.

    Of as many samples as the newest value is.
    """
    if not self.keep.best:
      return None
    scores = self._scores.of(self.keep.best)
    steps = comparable(self.steps(), scores, self._scores.of('samples'))
    return best_step(steps, scores, self.keep)

  def save(
    self, step: int, state: dict[str, Any], data: Any, scores: dict[str, float] | None = None
  ) -> bool:
    """Starts to save; returns before the files are written unless a save is still under way.

    Trouble with the storage never raises: it is said and kept in `trouble`, here or at the next
    call of `save`, `poll` or `wait`.

    Args:
      state: pytrees of arrays under the names in `ITEMS`; empty ones are left out. They may be
        donated as soon as this returns.
      data: JSON-ready position of the data loader, as process 0 has it.
      scores: values of evaluation metrics at that step, if any.

    Returns:
      Whether the step is on its way to the disk or there already.
    """
    self._collect()
    if scores is not None:
      self._scores.add(step, scores)
    parts = {name: state[name] for name in ITEMS if _has_leaves(state[name])}
    try:
      if not self._saving.start(step, parts, data, self._prune, self._say):
        self._succeeded()
    except (NotSaved, TimeoutError) as error:
      self._failed(step, error)
      return False
    self._step = step
    return True

  def poll(self) -> None:
    """Notices what became of a save in the background; costs nothing and waits for nothing."""
    if self._saving.done:
      self._collect()

  def wait(self) -> bool:
    """Blocks until every save is on disk or has failed; whether the last one succeeded."""
    self._collect()
    if jax.process_index() == 0 and not self.read_only:
      self._prune()  # Scores may have come since the save began.
    return not self.trouble

  def should_retry(self) -> bool:
    """Whether the last save failed at least `retry_seconds` ago and none has begun since.

    Clocks differ: with several processes let one of them decide for all.
    """
    if self._saving.busy or self._failed_at is None:
      return False
    return time.monotonic() - self._failed_at >= self.retry_seconds

  def _collect(self) -> None:
    if not self._saving.busy:
      return
    try:
      self._saving.collect()
      self._succeeded()
    except (NotSaved, TimeoutError) as error:
      self._failed(self._step, error)

  def _succeeded(self) -> None:
    if self.trouble:
      self._say('checkpoints can be saved again.')
    self.trouble, self._failed_at = '', None

  def _failed(self, step: int, error: Exception) -> None:
    self.trouble = f'step {step} could not be saved ({error}); the run goes on and tries again.'
    self._failed_at = time.monotonic()
    self._say(self.trouble)

  def scores(self, step: int, values: dict[str, float]) -> None:
    """Notes values of evaluation metrics at a step that is saved, which may change what is kept."""
    self._scores.add(step, values)
    if self.keep.best and self.keep.best not in values:
      self._say(
        f'loop.keep_best is {self.keep.best!r}, which this evaluation does not measure; it '
        f'measures {", ".join(sorted(values)) or "nothing"}.'
      )
    if jax.process_index() == 0 and not self._saving.busy:
      self._prune()

  def _prune(self) -> None:
    """Deletes what the rule does not keep; process 0 alone."""
    try:
      steps = self.steps()
    except OSError as error:
      self._say(f'{self.directory} cannot be read ({reason(error)}); nothing is deleted there.')
      return
    known = self._scores.of(self.keep.best) if self.keep.best else {}
    stay = kept(steps, known, self.keep, self._scores.of('samples'))
    for step in sorted(set(steps) - stay):
      folder = self.directory / str(step)
      try:  # Renamed first, so that what is half deleted never passes for a checkpoint.
        away = folder.rename(folder.with_name(folder.name + DELETING))
        remove(away)
      except OSError as error:
        self._say(f'the old checkpoint {folder} cannot be deleted ({reason(error)}).')

  def restore_latest(self, abstract: dict[str, Any]) -> tuple[int, dict, Any] | None:
    """(step, state, data) of the newest checkpoint that is whole, onto `abstract`'s shardings.

    Damaged ones are moved to `directory`/quarantine, and `say` names them. The mesh and the number
    of processes may differ from those that saved.

    Returns:
      None when there never was a checkpoint.

    Raises:
      UserError: all are damaged, or the newest whole one is of another model.
    """
    wanted = {name: abstract[name] for name in ITEMS if _has_leaves(abstract[name])}
    found = self._newest(wanted, everything=True)
    if found is None:
      return None
    step, trees, data = found
    return step, {name: trees.get(name, abstract[name]) for name in ITEMS}, data

  def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(state, data) of a step, onto the shardings of `abstract`; nothing is moved.

    Raises:
      UserError: the checkpoint is damaged, or of another model.
    """
    wanted = {name: abstract[name] for name in ITEMS if _has_leaves(abstract[name])}
    trees, data = self._read(step, wanted, everything=True)
    return {name: trees.get(name, abstract[name]) for name in ITEMS}, data

  def restore_params(
    self, step: int | None, abstract: dict[str, Any], ema: bool
  ) -> dict[str, Any]:
    """Only the parameters of a step, averaged ones where `ema` says that there are some.

    Args:
      step: None for the newest whose parameters are whole; `say` names the ones passed over.

    Raises:
      UserError: there is no checkpoint, it is damaged, or of another model.
    """
    name = 'ema' if ema else 'params'
    if step is not None:
      return self._read(step, {name: abstract}, everything=False)[0][name]
    found = self._newest({name: abstract}, everything=False)
    if found is None:
      raise UserError(f'{self.directory} has no checkpoint yet; train longer first.')
    return found[1][name]

  def _read(self, step: int, wanted: dict, everything: bool) -> tuple[dict[str, Any], Any]:
    self._collect()
    try:
      return read_step(self.directory / str(step), wanted, everything)
    except Damaged as error:
      raise UserError(
        f'the checkpoint {self.directory / str(step)} is damaged ({error}); choose another step.'
      ) from error

  def _newest(self, wanted: dict, everything: bool) -> tuple[int, dict[str, Any], Any] | None:
    self._collect()
    steps, moved = json.loads(agree('steps', in_step('listing', self._listed, (UserError,)))[0])
    problem = ''
    for step in reversed(steps):
      try:
        return step, *read_step(self.directory / str(step), wanted, everything)
      except Damaged as error:
        problem = str(error)
      self._pass_over(step, problem)
    if not steps and not moved:
      return None
    where = self.directory if steps and self.read_only else self.directory / QUARANTINE
    raise UserError(
      f'all checkpoints are damaged ({problem or "they were found so before"}); they are in '
      f'{where}: put a copy in their place, or delete that folder to begin anew.'
    )

  def _listed(self) -> str:
    try:
      return json.dumps([self.steps(), quarantined(self.directory)])
    except OSError as error:
      raise UserError(
        f'{self.directory} cannot be read ({reason(error)}); make it readable and start again.'
      ) from error

  def _pass_over(self, step: int, problem: str) -> None:
    folder = self.directory / str(step)
    if self.read_only:
      self._say(f'the checkpoint {folder} is damaged ({problem}); the one before it is used.')
      return

    def move() -> str:
      try:
        return str(quarantine(self.directory, step)) if jax.process_index() == 0 else ''
      except OSError as error:
        raise UserError(
          f'the checkpoint {folder} is damaged ({problem}) and cannot be moved ({reason(error)}); '
          'move it out of the way.'
        ) from error

    target = in_step('quarantine', move, (UserError,))
    self._say(f'the checkpoint {folder} is damaged ({problem}); it was moved to {target}.')

  def close(self) -> None:
    """Waits, then frees threads."""
    self._collect()
    self._saving.close()


def remove(folder: Path) -> None:
  """Removes a folder, or a link to one, with what can be removed of it."""
  if folder.is_symlink():
    folder.unlink()
  else:
    shutil.rmtree(folder)


def _has_leaves(tree: Any) -> bool:
  return bool(jax.tree.leaves(tree))
