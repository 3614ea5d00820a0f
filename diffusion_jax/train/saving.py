"""Checkpoints of a run: while it trains, before an error ends it, and at its end."""

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

from diffusion_jax.checkpoint.checkpoints import Checkpoints, Keep
from diffusion_jax.checkpoint.saving import is_storage_error, may_pass, reason
from diffusion_jax.evaluation.metrics.metric import HIGHEST, LOWEST, best_is
from diffusion_jax.evaluation.patience import course
from diffusion_jax.files import reading
from diffusion_jax.parallel.mesh import to_host
from diffusion_jax.parallel.processes import A_DAY, agree
from diffusion_jax.train.health import Safety
from diffusion_jax.train.meter import Metrics
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.training import Training

MEET_SECONDS = 30.0
"""For all processes to come before a rescue: those that wait within a step for the one that failed
never do."""
TRIES = 3
"""Tries of the last writes, where an error will not pass by itself."""


class Restored(NamedTuple):
  """A saved run: its state, metrics since the last log line, and seconds spent by phase."""

  state: TrainState
  totals: Metrics
  goodput: dict[str, float]


class Saver(Checkpoints):
  """The checkpoints of a run, with its positions in data and metrics."""

  def __init__(self, training: Training, say: Callable[[str], None], read_only: bool = False):
    loop = training.loop
    best = loop.keep_best_is or (best_is(loop.keep_best) if loop.keep_best else LOWEST)
    super().__init__(
      training.directory.checkpoints,
      Keep(loop.keep_checkpoints, loop.keep_every_steps, loop.keep_best, best),
      retry_seconds=training.safety.checkpoint_retry_seconds, say=say, read_only=read_only,
    )
    self.loader, self._loop, self._ask_every = training.loader, loop, loop.log_every_steps

  def restore_run(self, abstract: TrainState, step: int | None = None) -> Restored | None:
    """The state of a step, None: the newest intact one, the loader set after it.

    UserError: damage, or another model.
    """
    found = self.restore(_as_parts(abstract), step)
    if found is None:
      return None
    step, parts, extra = found
    with reading(
      f'what the checkpoint of step {step} says of data and metrics', 'cannot be understood',
      'it was not saved by train: choose another workdir',
    ):
      self.loader.set_state(extra['loader'])
      totals = {
        name: Average(*(np.asarray(part, np.float32) for part in pair))
        for name, pair in extra['totals'].items()
      }
      goodput = {name: float(seconds) for name, seconds in extra['goodput'].items()}
    rest = parts['rest']
    state = TrainState(
      rest['step'], rest['key'], parts['params'], parts['opt_state'], parts['ema'],
      rest['memory'], rest['guard'],
    )
    return Restored(state, totals, goodput)

  def save_run(
    self, step: int, state: TrainState, totals: Metrics, goodput: dict[str, float]
  ) -> None:
    """Start to save a step that is not saved yet."""
    self.save(step, _as_parts(state), {
      'loader': self.loader.get_state(),
      'totals': {
        name: [one.total.tolist(), one.count.tolist()] for name, one in to_host(totals).items()
      },
      'goodput': goodput,
    })

  def scores(self, step: int, values: dict[str, float]) -> None:
    super().scores(step, values)
    if (name := self._loop.stop_when) and name not in values:
      self._say(
        f'loop.stop_when is {name!r}, which this evaluation does not measure; it measures '
        f'{", ".join(sorted(values)) or "nothing"}.'
      )

  def lacks_score(self, step: int) -> bool:
    """True where an evaluation of this step would have been noted that decides on the run's end."""
    every = self._loop.evaluate_every_steps
    return bool(self._loop.stop_when and step % every == 0 and step not in self._deciding(step))

  def _deciding(self, step: int) -> dict[int, float]:
    """Return the values of loop.stop_when up to a step: those that a run without a break has."""
    every, values = self._loop.evaluate_every_steps, self._scores.of(self._loop.stop_when)
    return {at: value for at, value in values.items() if at <= step and at % every == 0}

  def ends_at(self, step: int) -> str:
    """Say why the run ends at this step, before its last, by loop.stop_when; '' if it goes on.

    It follows from the noted evaluations alone, so that a resume decides alike.
    """
    loop = self._loop
    if not loop.stop_when:
      return ''
    highest = (loop.stop_when_is or best_is(loop.stop_when, 'stop_when')) == HIGHEST
    values = self._deciding(step)
    found, text = course(values, highest, loop.stop_margin), ''
    if found and found.since >= loop.stop_patience:
      text = (
        f'stopped at step {step:,} of {loop.total_steps:,}: {loop.stop_when} was best at step '
        f'{found.best:,} ({values[found.best]:.4g}), and no better in {found.since} evaluations '
        'since'
      )
    return agree('stop_when', text)[0]

  def retry_is_due(self, step: int) -> bool:
    """Say whether a save has failed and it is time to try again; the same on every process."""
    if jax.process_count() == 1:  # Several would not notice at the same step.
      self.poll()
    if not self.error or step % self._ask_every:
      return False
    # Clocks differ, so process 0 decides.
    return agree('retry', str(self.should_retry()))[0] == 'True'


def _as_parts(state: TrainState) -> dict[str, Any]:
  return {
    'params': state.params, 'opt_state': state.opt_state, 'ema': state.ema,
    'rest': {'step': state.step, 'key': state.key, 'memory': state.carry, 'guard': state.guard},
  }


def rescue(
  saver: Saver, state: TrainState, totals: Metrics, goodput: dict[str, float], most_skipped: int,
  data: dict[str, Any] | None,
) -> str:
  """Save the state if it is complete and finite; return a few words on that. Never raises.

  most_skipped: skips in a row after which a run counts as diverged. data: the loader's state before
  a batch that was not used, or None.
  """
  try:
    if jax.process_count() > 1:
      agree('rescue', '', MEET_SECONDS)
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
      why = 'the step that failed has taken the state with it'
    elif int(state.guard.in_a_row) >= most_skipped or not _finite(state):
      why = 'the state has diverged'
    else:
      step = int(state.step)
      if data is not None:
        saver.loader.set_state(data)
      saver.save_run(step, state, totals, goodput)
      if saver.wait():
        return f'step {step} was saved before'
      why = saver.error
  except Exception as error:  # Of whatever broke the run; that error matters, not this one.
    why = f'{type(error).__name__}: {error}'[:200]
  return f'the last checkpoint is of step {saver.latest()} ({why})'


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _finite(state: TrainState) -> bool:
  leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
  return bool(_all_finite([x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]))


def wait_for_room(
  safety: Safety, saver: Saver, *, save: Callable[[], None], export: Callable[[], None],
  say: Callable[[str], None],
) -> str:
  """Wait until the last checkpoint and the model are on disk; return what is missing, or ''.

  Errors that room does not mend are retried `TRIES` times. All processes call it together; each try
  is reported. save: starts to save the last step, in all processes. export: writes the model, in
  process 0. Stopping: a process was asked to stop.
  """
  end = time.monotonic() + (safety.config.room_timeout_seconds or math.inf)
  pause = safety.config.checkpoint_retry_seconds
  exported, tries = False, 0
  while True:
    with safety.watchdog.allow(0, 'checkpoint'):
      saver.wait()
      problem = '' if exported else _tried(export)
      exported = not problem
      # Process 0 alone exports, and its clock decides for all.
      tries += 1
      problems = list(filter(None, (saver.error, problem)))
      over = time.monotonic() > end or (tries >= TRIES and not all(map(may_pass, problems)))
      missing, over = json.loads(agree('room', json.dumps([' '.join(problems), over]), A_DAY)[0])
    if not missing or over:
      return missing
    say(f'{missing} Waiting for room; the next try is in {pause:g} s, and a signal ends that.')
    safety.report('saving', message=missing)
    for _ in range(max(1, math.ceil(pause))):  # As often on all processes.
      time.sleep(min(1.0, pause))
      safety.watchdog.heartbeat()
      safety.stop.barrier()
    if saver.error:
      save()


def _tried(export: Callable[[], None]) -> str:
  """Return what keeps the model from being written, '' once it is."""
  try:
    export()
  except Exception as error:
    if not is_storage_error(error):
      raise
    return f'the model could not be exported ({reason(error)}).'
  return ''
