"""A training, built and checked, as the loop is given it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from diffusion_jax.config import LoopConfig, SafetyConfig
from diffusion_jax.data.loader import Loader
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

  start: gives the parameters on a mesh that a new run begins with, None for fresh ones.
  measured: what the scores are measured on. provenance: sentences on the networks that were there
  before this run, such as those that score. evaluators: those of the task that are wanted.
  trained_on: the pictures, None where there are none. damage: records that could not be read.
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
