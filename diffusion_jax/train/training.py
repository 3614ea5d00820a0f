"""What the loop is given."""

import dataclasses
from typing import Any

import optax
from jax.sharding import Mesh

from diffusion_jax.data.loader import Loader
from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.train.config import LoopConfig, SafetyConfig
from diffusion_jax.train.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Training:
  """Everything the loop needs, built and checked."""

  config: dict[str, Any]
  task: Task
  loop: LoopConfig
  safety: SafetyConfig
  optimizer: optax.GradientTransformation
  learning_rates: dict[str, optax.Schedule]
  loader: Loader
  mesh: Mesh
  directory: RunDirectory
  data_credit: str = ''
