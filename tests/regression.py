"""The smallest task there is, for tests of the step itself."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.train.meter import mean_metric
from diffusion_jax.train.tasks.task import Task


class Regression(Task):
  """A linear layer; its loss is a mean over examples, and `noise` times a random number."""

  batch_fields = ('x', 'y')

  def __init__(self, noise: float = 0.0):
    self.noise = noise
    self.frozen = {}

  def initialize(self, key):
    return {'kernel': jax.random.normal(key, (8, 4)), 'bias': jnp.zeros(4)}

  def loss(self, params, frozen, carry, batch, key, step):
    x = batch['x'] + self.noise * jax.random.normal(key, batch['x'].shape)
    error = jnp.square(x @ params['kernel'] + params['bias'] - batch['y']).mean(axis=1)
    return error.mean(), ({'loss': mean_metric(error)}, ())


def regression_batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Inputs [size 8] and targets [size 4], unit Gaussian."""
  rng = np.random.default_rng(seed)
  return {'x': rng.normal(size=(size, 8)), 'y': rng.normal(size=(size, 4))}
