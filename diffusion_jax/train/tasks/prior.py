"""Train DALL-E 2's prior (Ramesh et al. 2022, section 2.2) for a decoder that is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.files import check_folder
from diffusion_jax.formats.networks import resolve
from diffusion_jax.formats.pipeline import keep_folder
from diffusion_jax.models.network import prefixed, under
from diffusion_jax.pipelines.directory import read_model
from diffusion_jax.pipelines.unclip import DECODER, PRIOR, UnCLIP, save_index
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.diffusion_settings import DiffusionTaskConfig
from diffusion_jax.train.tasks.task import Env, Frozen, Task
from diffusion_jax.types import Params, Scores, Source, Weights


@dataclasses.dataclass(frozen=True)
class PriorTaskConfig(DiffusionTaskConfig):
  """decoder: the directory of a model of diffusion that is conditioned on image_embedding; space
  must be embeddings, those of the decoder's CLIP."""

  decoder: str = dataclasses.field(kw_only=True)


class PriorTask(Task):
  """A task on embeddings; what is drawn and scored are the decoder's pictures."""

  Config = PriorTaskConfig
  upgrade_settings = staticmethod(DiffusionTask.upgrade_settings)
  name, title = 'prior', 'Text-to-image model by embeddings'
  inner: ClassVar[type[Task]] = DiffusionTask
  """The task that the prior is trained by."""
  computing = DiffusionTask.computing
  captioned = True

  def __init__(self, task: Task, model: UnCLIP, decoder: Weights):
    """`decoder`: its weights."""
    self.task, self.model, self.config = task, model, task.config
    self.frozen: Frozen = {**task.frozen, **prefixed(DECODER, decoder)}
    self.batch_fields = task.batch_fields

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    cls.inner.check_data(config)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> PriorTask:
    check_folder(resolve(config.settings.decoder))  # It is copied when training ends.
    task = cls.inner.build(config, env)
    decoder, parts, sample = read_model(config.settings.decoder, getattr(jnp, config.dtype))
    weights = {role: part.load(mesh=env.mesh) for role, part in parts.items()}
    return cls(task, UnCLIP(task.model, decoder, sample), weights)

  def context(self) -> dict[str, Any]:
    return self.task.context()

  def examples(self, config: TrainingConfig, env: Env) -> tuple[Source, list[Callable]]:
    return self.task.examples(config, env)

  def initialize(self, key: jax.Array) -> Params:
    return self.task.initialize(key)

  def loss(self, params, frozen, carry, batch, key, step) -> tuple[jax.Array, tuple]:
    return self.task.loss(params, frozen, carry, batch, key, step)

  def carry(self):
    return self.task.carry()

  def next_carry(self, carry, observed):
    return self.task.next_carry(carry, observed)

  def weights(self, params: Params, frozen: Frozen) -> Weights:
    decoder = prefixed(DECODER, under(DECODER, frozen))
    own = {name: value for name, value in frozen.items() if name not in decoder}
    return {**prefixed(PRIOR, self.task.weights(params, own)), **decoder}

  def keep(self, workdir: Path) -> None:
    self.task.keep(workdir)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    return self.task.evaluators(mesh)

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write prior and decoder as a directory that `sample --model` reads."""
    self.task.export(directory / PRIOR, params, scores)
    save_index(directory, keep_folder(self.config.decoder, directory, DECODER))
