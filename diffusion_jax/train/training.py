"""What the loop is given."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from diffusion_jax.data.loader import Loader
from diffusion_jax.data.splits import APART, Measured
from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.train.config import LoopConfig, SafetyConfig
from diffusion_jax.train.tasks.task import Task
from diffusion_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything the loop needs, built and checked.

  start: gives the parameters on a mesh that a new run begins with, None for fresh ones.
  measured: what the scores are measured on.
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
