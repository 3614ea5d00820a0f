"""The guidance that a distilled denoiser imitates, such as that of Flux.1 dev."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.limits import Range
from diffusion_jax.pipelines.conditioners import Conditioner

Scale = Annotated[float, Range(-math.inf, math.inf, above=True, below=True, text='a finite scale')]


@dataclasses.dataclass(frozen=True)
class DistilledGuidance(Conditioner):
  """A number beside the time, which takes the place of classifier-free guidance (Meng et al. 2023).

  Adds 'guidance' [b]; `scale` is what is told in training, and in sampling where nothing is said.
  """

  scale: Scale = 3.5
  name: ClassVar = 'distilled_guidance'

  @classmethod
  def build(cls, options, context):
    return typed(cls, options, f'settings.conditioners.{cls.name}.'), {}

  def rows(self, request):
    scale = self.scale if request.guidance is None else request.guidance
    return {'guidance': np.full(len(request.prompts), scale, np.float32)}

  def encode(self, weights, rows):
    return {'guidance': rows['guidance']}

  def of_batch(self, weights, batch, key=None):
    count = len(next(iter(batch.values())))
    return {'guidance': jnp.full(count, self.scale, jnp.float32)}
