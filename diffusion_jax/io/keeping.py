"""Which checkpoints stay on disk."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from diffusion_jax.errors import UserError

BEST_IS = ('lowest', 'highest')


@dataclasses.dataclass(frozen=True)
class Keep:
  """The newest `last`, every step that is a multiple of every_steps, and the best one.

  every_steps: 0 for none. best: name of an evaluation metric, '' for none. best_is: whether the
  lowest or the highest value of that metric is best.
  """

  last: int = 2
  every_steps: int = 0
  best: str = ''
  best_is: str = 'lowest'

  def __post_init__(self):
    if self.last < 1:
      raise UserError(f'loop.keep_last is {self.last}; it must be at least 1.')
    if self.every_steps < 0:
      raise UserError(
        f'loop.keep_every_steps is {self.every_steps}; give a number of steps, or 0 for none.'
      )
    if self.best_is not in BEST_IS:
      raise UserError(
        f'loop.keep_best_is is {self.best_is!r}; choose one of {", ".join(BEST_IS)}.'
      )


def best_step(steps: Iterable[int], scores: Mapping[int, float], keep: Keep) -> int | None:
  """The step of the best finite score, the newest of equal ones; None when no step has one."""
  sign = 1 if keep.best_is == 'highest' else -1
  scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
  return max(scored, key=lambda step: (sign * scores[step], step), default=None)


def kept(steps: Iterable[int], scores: Mapping[int, float], keep: Keep) -> set[int]:
  """The steps that stay.

  Args:
    steps: those on disk.
    scores: step -> value of the metric `keep.best`; steps may be missing.
  """
  steps = sorted(steps)
  stay = set(steps[-keep.last :])
  if keep.every_steps:
    stay |= {step for step in steps if step % keep.every_steps == 0}
  best = best_step(steps, scores, keep) if keep.best else None
  return stay if best is None else stay | {best}
