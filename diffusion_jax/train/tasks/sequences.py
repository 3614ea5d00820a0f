"""Trains a denoiser of sequences: the task of pictures, where the data are none."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.config import TrainingConfig
from diffusion_jax.data.sources import open_data
from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.diffusion.objective import ObjectiveConfig
from diffusion_jax.errors import UserError
from diffusion_jax.formats.networks import config_of
from diffusion_jax.limits import ByType, FileDtype
from diffusion_jax.models.dit import DiTConfig
from diffusion_jax.pipelines.assembly import assemble
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.pipelines.sequences import SequenceSpace
from diffusion_jax.pipelines.spaces import Patch
from diffusion_jax.registry import EVALUATORS, EXPORTS, NETWORKS, load
from diffusion_jax.train.tasks.diffusion import DiffusionTask
from diffusion_jax.train.tasks.task import Env
from diffusion_jax.types import Params, Scores, Source


@dataclasses.dataclass(frozen=True)
class SequenceTaskConfig:
  """denoiser: a row of `registry.NETWORKS` that takes one row of places. patch: places of a
  sequence that it sees as one."""

  denoiser: Annotated[Any, ByType(NETWORKS, 'dit', config_of)] = DiTConfig()
  patch: Patch = 1
  schedule: NoiseConfig = NoiseConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  sample: SampleConfig = SampleConfig(guidance=1.0)
  export_dtype: FileDtype = 'float16'
  cache: ClassVar[bool] = False
  caption_dropout: ClassVar[float] = 0.0
  encoder_dropout: ClassVar[tuple[float, ...]] = ()


class SequenceTask(DiffusionTask):
  """Parameters are the denoiser's."""

  Config = SequenceTaskConfig
  upgrade_settings = staticmethod(dict)
  name, title = 'sequences', 'Diffusion model of sequences'
  pictures = captioned = False

  @classmethod
  def described(cls, size: int) -> tuple[str, str]:
    return 'sequences', f'{size} places'

  @classmethod
  def check_data(cls, config: TrainingConfig) -> None:
    if config.data.transforms:
      raise UserError('data.transforms have no effect on sequences; empty them.')
    SequenceSpace(patch=config.settings.patch).shape(1, config.data.size)

  @classmethod
  def open_sources(cls, config: TrainingConfig, synthetic: bool) -> tuple[Source, Source]:
    """Sequences are in memory, so there is nothing to measure without them."""
    return open_data(config.data)

  @classmethod
  def build(cls, config: TrainingConfig, env: Env) -> 'SequenceTask':
    settings, first = config.settings, env.test[0]
    if 'sequence' not in first:
      raise UserError(
        f'data.dataset is {config.data.dataset!r}, which holds no sequences; choose '
        'autoregressive, sines, outlines or sequences:FILE.npy.'
      )
    length, values = first['sequence'].shape
    space = SequenceSpace(values, settings.patch, env.test.plane)
    model, _ = assemble(
      settings.denoiser, space, {}, settings.schedule, settings.objective.parameterization,
      size=(1, length), dtype=getattr(jnp, config.dtype),
    )
    model = model.with_compute(attention=config.attention)
    return cls(settings, model, {}, env.train, env.test, config.remat, config.products)

  def evaluators(self, mesh: Mesh) -> list[Any]:
    given = self.config.sample, self.train, self.test, mesh
    return [load(EVALUATORS, name)(*given) for name in ('sequences_preview', 'sequences')]

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the model as a directory that `sample --model` reads."""
    load(EXPORTS, 'model')(
      directory, self.model, params, space=self.model.space, conditioners={},
      sample=self.config.sample, dtype=self.config.export_dtype,
    )
