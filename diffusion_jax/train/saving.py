"""What of a run goes into a checkpoint, and back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.keeping import Keep
from diffusion_jax.parallel.agreement import agree
from diffusion_jax.parallel.sharding import to_host
from diffusion_jax.reading import reading
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.tasks.task import Metrics
from diffusion_jax.train.training import Training


class Restored(NamedTuple):
  """A saved run: its state, metrics since the last log line, and seconds spent by phase."""

  state: TrainState
  totals: Metrics
  goodput: dict[str, float]


class Saver:
  """The checkpoints of a run, in the background.

  A checkpoint that cannot be written, such as for want of space, does not end the run: `trouble`
  says what is wrong, and `retry_is_due` when to try again.
  """

  def __init__(self, training: Training, say: Callable[[str], None]):
    loop = training.loop
    self._loader, self._ask_every = training.loader, loop.log_every_steps
    self._checkpoints = Checkpoints(
      training.directory.checkpoints,
      Keep(loop.keep_checkpoints, loop.keep_every_steps, loop.keep_best, loop.keep_best_is),
      retry_seconds=training.safety.checkpoint_retry_seconds, say=say,
    )

  def restore(self, abstract: TrainState) -> Restored | None:
    """The newest state that is whole, with the loader set to what comes after it.

    Raises:
      UserError: there are checkpoints, but all are damaged, or they are of another model.
    """
    found = self._checkpoints.restore_latest(_as_parts(abstract))
    if found is None:
      return None
    step, parts, extra = found
    with reading(
      f'what the checkpoint of step {step} says of data and metrics', 'cannot be understood',
      'it was not saved by train: choose another workdir',
    ):
      self._loader.set_state(extra['loader'])
      totals = {
        name: tuple(np.asarray(part, np.float32) for part in pair)
        for name, pair in extra['totals'].items()
      }
      goodput = {name: float(seconds) for name, seconds in extra['goodput'].items()}
    state = TrainState(
      **{name: parts[name] for name in ('params', 'opt_state', 'ema')}, **parts['rest']
    )
    return Restored(state, totals, goodput)

  def save(
    self, step: int, state: TrainState, totals: Metrics, goodput: dict[str, float]
  ) -> None:
    """Starts to save a step that is not saved yet."""
    extra: dict[str, Any] = {
      'loader': self._loader.get_state(),
      'totals': {
        name: [part.tolist() for part in pair] for name, pair in to_host(totals).items()
      },
      'goodput': goodput,
    }
    self._checkpoints.save(step, _as_parts(state), extra)

  def rewind(self, data: dict[str, Any]) -> None:
    """Sets the loader back to what it said of itself."""
    self._loader.set_state(data)

  def scores(self, step: int, values: dict[str, float]) -> None:
    """Tells how a step was scored, which decides what is kept."""
    self._checkpoints.scores(step, values)

  @property
  def trouble(self) -> str:
    """What keeps checkpoints from being written, '' for nothing."""
    return self._checkpoints.trouble

  @property
  def latest(self) -> int | None:
    """The newest step on disk."""
    return self._checkpoints.latest()

  def retry_is_due(self, step: int) -> bool:
    """Whether a save has failed and it is time to try again; the same on every process."""
    if jax.process_count() == 1:  # Several would not notice at the same step.
      self._checkpoints.poll()
    if not self._checkpoints.trouble or step % self._ask_every:
      return False
    # Clocks differ, so process 0 decides.
    return agree('retry', str(self._checkpoints.should_retry()))[0] == 'True'

  def wait(self) -> None:
    """Blocks until what can be written is on disk."""
    self._checkpoints.wait()

  def close(self) -> None:
    """Waits, then frees threads."""
    self._checkpoints.close()


def _as_parts(state: TrainState) -> dict[str, Any]:
  return {
    'params': state.params, 'opt_state': state.opt_state, 'ema': state.ema,
    'rest': {name: getattr(state, name) for name in ('step', 'key', 'memory', 'guard')},
  }
