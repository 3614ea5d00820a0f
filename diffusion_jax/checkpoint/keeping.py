"""Which checkpoints stay on disk, and the evaluation scores that this depends on."""

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.files import atomic_write, read_object, reading

SCORES = 'scores.json'


@dataclasses.dataclass(frozen=True)
class Keep:
  """The newest `last`, every step that is a multiple of every_steps, and the best one.

  every_steps: 0 for none. best: a metric of the evaluation, '' for none. best_is: whether its
  lowest or its highest value is best.
  """

  last: int = 2
  every_steps: int = 0
  best: str = ''
  best_is: str = 'lowest'


def kept(
  steps: Iterable[int], scores: Mapping[int, float], keep: Keep,
  samples: Mapping[int, float] | None = None,
) -> set[int]:
  """Return the steps that stay.

  Orbax's policies know no numbers of samples, and run only within its manager.

  Args:
    steps: those on disk.
    scores: step -> value of the metric `keep.best`; steps may be missing.
    samples: step -> number of samples that it was computed of. Metrics of other numbers cannot be
      compared (FID falls as they grow), so the best of each number stays.
  """
  steps, samples = sorted(steps), samples or {}
  stay = set(steps[-keep.last :])
  if keep.every_steps:
    stay |= {step for step in steps if step % keep.every_steps == 0}
  if keep.best:
    sign = 1 if keep.best_is == 'highest' else -1
    best: dict[float | None, int] = {}
    for step in steps:  # The newest of equal ones.
      if math.isfinite(score := scores.get(step, math.nan)):
        rival = best.get(samples.get(step))
        if rival is None or sign * score >= sign * scores[rival]:
          best[samples.get(step)] = step
    stay |= set(best.values())
  return stay


class Scores:
  """`directory`/scores.json: {step: {metric: value}}. Only process 0 writes."""

  def __init__(self, directory: Path, say: Callable[[str], None]):
    self._file, self._say = directory / SCORES, say
    self._lock = threading.Lock()  # Steps are pruned in the thread that saves.
    self._values: dict[int, dict[str, float]] = self._read()

  def _read(self) -> dict[int, dict[str, float]]:
    if not os.path.lexists(self._file):
      return {}
    try:
      with reading(self._file, remedy='scores of old checkpoints are forgotten'):
        values = read_object(self._file)
        return {int(step): {k: float(v) for k, v in each.items()} for step, each in values.items()}
    except UserError as error:
      self._say(str(error))
      return {}

  def of(self, metric: str) -> dict[int, float]:
    """Return {step: value} of a metric, of the steps that have one."""
    with self._lock:
      return {step: v[metric] for step, v in self._values.items() if metric in v}

  def add(self, step: int, values: dict[str, float]) -> None:
    """Note values at a step; errors of storage are only said."""
    with self._lock:
      known = self._values.setdefault(step, {})
      known |= {name: float(value) for name, value in values.items()}
      text = json.dumps(self._values, indent=1)
    if jax.process_index() != 0:
      return
    try:
      with atomic_write(self._file) as file:
        file.write(text.encode())
    except OSError as error:
      self._say(f'{self._file} cannot be written ({error}).')
