"""An evaluator: how bright the images are that a model samples without a caption."""

import dataclasses
from typing import Any

import jax
import numpy as np

from diffusion_jax.evaluation.evaluator import EVALUATE
from diffusion_jax.registry import EVALUATORS, register


@dataclasses.dataclass(frozen=True)
class Brightness:
  """count: of images."""

  sample: Any
  mesh: jax.sharding.Mesh
  count: int = 4
  name, when = 'brightness', EVALUATE

  def run(self, model, params, key):
    images = np.concatenate(list(model.generate(
      params, [''] * self.count, self.sample, seed=0, mesh=self.mesh
    )))
    yield 'brightness', float(images.mean())
    yield 'measured', [f'Brightness of {len(images)} images.']


register(EVALUATORS, 'brightness', f'{__name__}:Brightness')
