"""The guidance that a distilled denoiser imitates, as Flux.1 dev and consistency models do."""

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
  usual: ClassVar = True

  @classmethod
  def build(cls, options, context):
    return typed(cls, options, f'settings.conditioners.{cls.name}.'), {}

  def rows(self, request):
    scale = self.scale if request.guidance is None else request.guidance
    return {'guidance': np.full(len(request.prompts), scale, np.float32)}

  def encode(self, weights, rows):
    return {'guidance': rows['guidance']}

  def of_size(self, count, height, width):
    return {'guidance': jnp.full(count, self.scale, jnp.float32)}
