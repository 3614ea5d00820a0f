"""Which checkpoints stay on disk."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from diffusion_jax.errors import UserError

BEST_IS = ('lowest', 'highest')


@dataclasses.dataclass(frozen=True)
class Keep:
  """The newest `last`, every step that is a multiple of every_steps, and the best one.

  every_steps: 0 for none. best: a figure of the evaluation, '' for none. best_is: whether the
  lowest or the highest value of that figure is best.
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
  return max(
    _scored(steps, scores), key=lambda step: (sign * scores[step], step), default=None
  )


def comparable(
  steps: Iterable[int], scores: Mapping[int, float], samples: Mapping[int, float]
) -> list[int]:
  """The steps with a finite score of as many samples as the newest of them."""
  scored = _scored(steps, scores)
  return [step for step in scored if samples.get(step) == samples.get(max(scored))]


def _scored(steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
  return [step for step in steps if math.isfinite(scores.get(step, math.nan))]


def kept(
  steps: Iterable[int], scores: Mapping[int, float], keep: Keep,
  samples: Mapping[int, float] | None = None,
) -> set[int]:
  """The steps that stay.

  Args:
    steps: those on disk.
    scores: step -> value of the figure `keep.best`; steps may be missing.
    samples: step -> number of samples that it was computed of. Figures of other numbers cannot be
      compared (FID falls as they grow), so the best of each number stays.
  """
  steps = sorted(steps)
  stay = set(steps[-keep.last :])
  if keep.every_steps:
    stay |= {step for step in steps if step % keep.every_steps == 0}
  if keep.best:
    of = {step: (samples or {}).get(step) for step in steps}
    bests = (best_step([s for s in steps if of[s] == n], scores, keep) for n in set(of.values()))
    stay |= {best for best in bests if best is not None}
  return stay
