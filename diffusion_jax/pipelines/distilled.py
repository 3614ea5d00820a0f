"""What a distilled denoiser is told: the guidance that it imitates, the way that it is to go."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.config import typed
from diffusion_jax.diffusion.denoiser import TextDenoiser
from diffusion_jax.diffusion.samplers import Grid, info
from diffusion_jax.limits import Range
from diffusion_jax.models.dit import INTERVAL
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


def imitates_guidance(config: Any) -> bool:
  """Return whether the guidance that a denoiser is told replaces classifier-free guidance.

  False for configs without the property, such as those of networks from elsewhere.
  """
  return getattr(config, 'imitates_guidance', False)


def predicts_mean_velocity(config: Any) -> bool:
  """Return whether a denoiser must be told how far a step goes, see `told_interval`.

  False for configs without the field, such as those of networks from elsewhere.
  """
  return getattr(config, INTERVAL, False)


def told_interval(denoise: TextDenoiser, sampler: str, grid: Grid) -> TextDenoiser:
  """Return a denoiser of mean velocities (Geng et al. 2025, algorithm 2), told how far a step goes.

  That is of samplers which go straight from each level of the grid to the next. Those that ask at
  several levels for one step are given the velocity at each, so the way 0.
  """
  about = info(sampler)
  if about.order != 1 or about.stochastic:
    return denoise

  def told(x, alpha, sigma, condition):
    here = (grid[0] == alpha) & (grid[1] == sigma)
    index = jnp.argmax(here)
    way = jnp.where(here.any(), grid[1][index] - grid[1][index + 1], 0)
    more = {**(condition.more or {}), INTERVAL: jnp.full(len(x), way)}
    return denoise(x, alpha, sigma, condition._replace(more=more))

  return told
