"""A training, built and checked, as the loop is given it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from diffusion_jax.config import LoopConfig, SafetyConfig
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.mixture import Mixed
from diffusion_jax.data.splits import APART, Measured
from diffusion_jax.data.unreadable import Damage
from diffusion_jax.evaluation.evaluator import Evaluator
from diffusion_jax.runs.directory import RunDirectory
from diffusion_jax.runs.trained_on import DataSplit
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.types import Params, Scores


def stating(scores: Scores, step: int, about: Sequence[str]) -> Scores:
  """Return scores with sentences on what they are measured on, and the step that they are of."""
  return scores | {
    'measured': [*about, *scores.get('measured', ())],
    'settings': {'step': step} | scores.get('settings', {}),
  }


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything the loop needs, built and checked.

  start: makes a new run's initial parameters on a mesh; None for fresh ones. measured: the data of
  the scores. provenance: sentences on their size, and on networks from before this run. evaluators:
  of the task, in use. trained_on: the pictures, or None. damage: unreadable records. mixture: the
  parts of the data, where it has any.
  """

  config: dict[str, Any]
  task: Task
  loop: LoopConfig
  safety: SafetyConfig
  optimizer: optax.GradientTransformation
  learning_rates: dict[str, optax.Schedule]
  loader: Loader
  mesh: Mesh
  directory: RunDirectory
  start: Callable[[Mesh], Params | None]
  data_credit: str = ''
  measured: Measured = APART
  damage: Damage = dataclasses.field(default_factory=Damage)
  provenance: tuple[str, ...] = ()
  evaluators: Sequence[Evaluator] = ()
  trained_on: DataSplit | None = None
  mixture: Mixed | None = None
