"""Saves what there is before an error ends a run."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.parallel.agreement import agree
from diffusion_jax.train.saving import Saver
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.tasks.task import Metrics

MEET_SECONDS = 30.0
"""For all processes to come: those that wait within a step for the one that failed never do."""


def rescue(
  saver: Saver, state: TrainState, totals: Metrics, goodput: dict[str, float], most_skipped: int,
  data: dict[str, Any] | None,
) -> str:
  """Saves the state if it is whole and sound; a few words on what became of it. Never raises.

  Args:
    most_skipped: steps in a row that are skipped before a run counts as diverged.
    data: where the loader stood before a batch that has been drawn in vain, None for none.
  """
  try:
    if jax.process_count() > 1:
      agree('rescue', '', MEET_SECONDS)
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
      return _not_saved(saver, 'the step that failed has taken the state with it')
    if int(state.guard.in_a_row) >= most_skipped or not _finite(state):
      return _not_saved(saver, 'the state has diverged')
    step = int(state.step)
    if data is not None:
      saver.rewind(data)
    saver.save(step, state, totals, goodput)
    saver.wait()
    return _not_saved(saver, saver.trouble) if saver.trouble else f'step {step} was saved before'
  except Exception as error:  # Of whatever broke the run; that error matters, not this one.
    return _not_saved(saver, f'{type(error).__name__}: {error}'[:200])


def _not_saved(saver: Saver, why: str) -> str:
  return f'the last checkpoint is of step {saver.latest} ({why})'


def _finite(state: TrainState) -> bool:
  floats = [
    leaf for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return bool(jax.jit(lambda leaves: jnp.stack([jnp.isfinite(x).all() for x in leaves]).all())(
    floats
  ))
