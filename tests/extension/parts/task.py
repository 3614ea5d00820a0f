"""A task: learn the mean image of the data, which its loss has for its minimum."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.evaluator import EVALUATE, SAMPLE, Picture
from diffusion_jax.pixels import to_float, to_uint8
from diffusion_jax.registry import TASKS, register
from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class MeanConfig:
  """start: value of all pixels before training."""

  start: float = 0.0


@dataclasses.dataclass
class Show:
  """Shows the mean image."""

  name, when = 'mean_image', SAMPLE

  def run(self, model, params, key):
    yield 'samples', Picture(to_uint8(np.asarray(params['mean.bias'])[None]), ['mean'], 'The mean.')


@dataclasses.dataclass
class Distance:
  """Measures how far the test images are from it."""

  test: list
  name, when = 'distance', EVALUATE

  def run(self, model, params, key):
    images = to_float(np.stack([record['image'] for record in self.test]))
    yield 'test.mean_distance', float(np.abs(images - np.asarray(params['mean.bias'])).mean())


class Mean(Task):
  """One parameter for each pixel."""

  Config = MeanConfig
  name, title = 'mean', 'Mean of images'
  computing = ()
  batch_fields = ('image',)
  frozen: ClassVar[dict] = {}

  def __init__(self, config, size, test):
    self.config, self.size, self.test = config, size, test

  @classmethod
  def build(cls, config, env):
    return cls(config.settings, config.data.size, [env.test[i] for i in range(8)])

  def initialize(self, key):
    return {'mean.bias': jnp.full((self.size, self.size, 3), self.config.start)}

  def loss(self, params, frozen, carry, batch, key, step):
    error = ((batch['image'] - params['mean.bias']) ** 2).mean((1, 2, 3))
    return error.mean(), ({'loss': mean_metric(error)}, ())

  def evaluators(self, mesh):
    return [Show(), Distance(self.test)]


register(TASKS, 'mean', f'{__name__}:Mean')
