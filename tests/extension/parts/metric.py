"""A metric: how far features of the samples lie from their mean, by which collapse shows."""

import numpy as np

from diffusion_jax.evaluation.metrics.metric import HIGHER, POOLED, Metric
from diffusion_jax.registry import METRICS, register


def compute(compared, values, seed):
  """Mean distance of the samples' features from their mean, with its interval."""
  features = compared.samples
  values.add_mean('spread', np.linalg.norm(features - features.mean(0), axis=1), seed)


SPREAD = Metric('spread', compute, POOLED, (), title='Spread of features', better=HIGHER)
register(METRICS, 'spread', f'{__name__}:SPREAD')
