"""Distils a pretrained pipeline into one of few steps: the same denoiser, taught by itself."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.distillation import (
  Draws,
  Estimate,
  Velocity,
  consistency,
  mean_flow,
  progressive,
)
from diffusion_jax.diffusion.objective import Losses
from diffusion_jax.diffusion.parameterization import expand
from diffusion_jax.diffusion.samplers import SPACINGS
from diffusion_jax.errors import UserError
from diffusion_jax.files import INDEX
from diffusion_jax.formats.networks import format_of
from diffusion_jax.formats.tensors import read_json, write_json
from diffusion_jax.limits import Fraction, Length, OneOf, Range
from diffusion_jax.models.dit import INTERVAL, DiTConfig
from diffusion_jax.models.unet import UNetConfig
from diffusion_jax.parallel.mesh import put_params
from diffusion_jax.pipelines.distilled import DistilledGuidance, imitates_guidance
from diffusion_jax.pipelines.model import DENOISER, Diffusion
from diffusion_jax.train.tasks.diffusion import Encoded
from diffusion_jax.train.tasks.finetune import FinetuneTask, FinetuneTaskConfig
from diffusion_jax.train.tasks.task import Carry
from diffusion_jax.train.tasks.trainable import Full, Trainable
from diffusion_jax.types import Condition, Params, Scores, Weights

TEACHER = 'teacher'
"""The role of the frozen denoiser that the student began as."""
GUIDANCE_FEATURES = 256
"""Sinusoids of the guidance that a U-Net is told, as in published consistency models."""
Scale = Annotated[float, Range(0, math.inf, below=True)]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """method: see `diffusion.distillation`. steps: of the student for progressive, whose teacher
  takes twice as many; of the teacher for consistency; without effect on mean_flow. guidance: the
  lowest and highest scale of the teacher's classifier-free guidance. Of a U-Net they may differ: it
  is told each example's. Others learn the one scale for good. spacing: of the steps, one
  of SPACINGS. delta: of consistency's error. jumps: of mean_flow."""

  method: Literal['consistency', 'progressive', 'mean_flow'] = 'consistency'
  steps: Annotated[int, Range(1, 1000)] = 16
  guidance: Annotated[tuple[Scale, ...], Length(2, 2)] = (1.0, 1.0)
  spacing: Annotated[str, OneOf(SPACINGS)] = 'trailing'
  delta: Annotated[float, Range(0, above=True)] = 1e-3
  jumps: Fraction = 0.5

  @property
  def teacher_steps(self) -> int:
    """Steps of the grid that the teacher walks; 0 where it walks none."""
    return {'consistency': self.steps, 'progressive': 2 * self.steps, 'mean_flow': 0}[self.method]

  def __post_init__(self):
    if self.guidance[0] > self.guidance[1]:
      raise UserError('settings.distill.guidance is (lowest, highest) scale; exchange the two.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationTaskConfig(FinetuneTaskConfig):
  """Settings of `finetune` with train denoiser; `objective` is the prediction alone."""

  distill: DistillConfig = DistillConfig()
  caption_dropout: Fraction = 0.0

  def __post_init__(self):
    super().__post_init__()
    for wrong, text in (
      (self.train != 'denoiser', 'train must be denoiser in distillation'),
      (self.inputs != 'none', 'inputs must be none in distillation'),
      (self.text_training != 'frozen', 'text_training must be frozen in distillation'),
      (bool(self.prior.folder), 'prior has no effect on distillation; leave it out'),
      (self.caption_dropout > 0 or any(self.encoder_dropout),
       'caption_dropout must be 0 in distillation, whose teacher is guided as it is'),
    ):
      if wrong:
        raise UserError(f'settings.{text}.')


class Student(Full):
  """All of the denoiser, with room for what it is told besides: the scale, or the way to go."""

  def adapted(self, model):
    given, config = self.config.distill, model.denoiser.config
    if given.teacher_steps:
      model.noise.grid(given.teacher_steps, given.spacing)  # Which refuses what it cannot place.
    if given.method == 'mean_flow':
      if type(config) is not DiTConfig or model.parameterization.name != 'flow_prediction':
        raise UserError(
          'settings.distill.method mean_flow is of a dit that predicts a flow; choose another '
          'model, or another method.'
        )
      config = dataclasses.replace(config, interval=True)
    elif type(config) is UNetConfig and not config.imitates_guidance and given.guidance[1] != 1:
      config = dataclasses.replace(config, time_cond_proj_dim=GUIDANCE_FEATURES)
    told = imitates_guidance(config)
    if not told and given.guidance[0] != given.guidance[1]:
      raise UserError(
        f'settings.distill.guidance is {given.guidance}, but the denoiser of {self.config.model} '
        'can be told no scale; give one twice.'
      )
    network = format_of(config).network(config, compute=model.denoiser.compute)
    model = model.replaced({DENOISER: network})
    if told:
      model = model.with_conditioner(
        DistilledGuidance.name, DistilledGuidance(sum(given.guidance) / 2)
      )
    return super().adapted(model)

  def start(self, frozen, mesh):
    """The teacher; what it has not is fresh, and adds nothing at first."""
    params = self.part.load(mesh=mesh)
    zeros = {
      name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.shapes.items()
      if name not in params and 'cond_proj' in name
    }
    return params | put_params(zeros, mesh)

  def rest(self, parts, **how):
    return {**super().rest(parts, **how), TEACHER: self.part.load(**how)}


class DistillationTask(FinetuneTask):
  """Parameters are the student's; its teacher is frozen."""

  Config = DistillationTaskConfig
  name, title = 'distillation', 'Distilled text-to-image model'
  trained: ClassVar[Mapping[str, type[Trainable]]] = {'denoiser': Student}

  @property
  def teacher(self) -> Diffusion:
    """The model as it was, with the weights of `TEACHER` for its denoiser."""
    network = self.trainable.part.network(compute=self.loss_model.denoiser.compute)
    return dataclasses.replace(self.loss_model, denoiser=network)

  def losses_of(
    self, weights: Weights, x0: jax.Array, encoded: Encoded, key_drop: jax.Array | None,
    key: jax.Array, carry: Carry,
  ) -> Losses:
    given, nulls = self.config.distill, self.nulls(weights)
    count = len(x0)
    text, null = (
      self.condition(encoded.conditions, nulls, key, x0.shape, jnp.full(count, rate))
      for key, rate in zip(jax.random.split(key_drop), (0.0, 1.0), strict=True)
    )
    key_scale, key_noise, key = jax.random.split(key, 3)
    low, high = given.guidance
    scale = jax.random.uniform(key_scale, (count,), minval=low, maxval=high)
    teacher = self._guided(weights, text, null, scale)
    draws = Draws(x0, jax.random.normal(key_noise, x0.shape), key)
    if given.method == 'mean_flow':
      fixed = jax.lax.stop_gradient(weights)
      return mean_flow(
        self._velocity(self.loss_model, weights, text),
        # Kernels have no second derivative.
        self._velocity(self.model.with_compute(attention='xla'), fixed, text),
        teacher, draws, self.model.noise, jumps=given.jumps,
      )
    if text.guidance is not None:
      text = text._replace(guidance=scale)
    denoise = self.loss_model.denoise(weights)
    student = lambda x, alpha, sigma: denoise(x, alpha, sigma, text)
    grid = self.model.noise.grid(given.teacher_steps, given.spacing)
    if given.method == 'progressive':
      return progressive(student, teacher, draws, self.model.noise, grid)
    return consistency(student, teacher, draws, self.model.noise, grid, given.delta)

  def _guided(
    self, weights: Weights, text: Condition, null: Condition, scale: jax.Array
  ) -> Estimate:
    """Return the teacher, guided by a scale [b], or told it where it is a distilled one itself."""
    told = imitates_guidance(self.teacher.denoiser.config)
    denoise = self.teacher.denoise({**weights, DENOISER: weights[TEACHER]})
    text, null = (one._replace(guidance=scale if told else None) for one in (text, null))

    def estimate(x, alpha, sigma):
      conditional = denoise(x, alpha, sigma, text)
      if told or self.config.distill.guidance == (1.0, 1.0):
        return conditional
      unconditional = denoise(x, alpha, sigma, null)
      return unconditional + expand(scale, x) * (conditional - unconditional)

    return estimate

  def _velocity(self, model: Diffusion, weights: Weights, text: Condition) -> Velocity:
    network, noise = model.network(weights), model.noise

    def velocity(x, t, interval):
      condition = text._replace(more={**(text.more or {}), INTERVAL: interval})
      return network(x, noise.label(1 - t, t), condition).astype(x.dtype)

    return velocity

  def export(self, directory: Path, params: Params, scores: Scores) -> None:
    """Write the pipeline, which samples as its previews do."""
    super().export(directory, params, scores)
    sample = dataclasses.asdict(self.config.sample)
    told = self.model.conditioners.get(DistilledGuidance.name)
    if told is not None:
      sample |= {'guidance': told.scale}  # Of which the reader makes what is told.
    index = read_json(directory / INDEX)
    write_json(directory / INDEX, index | {'sample': sample})
