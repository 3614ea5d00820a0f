"""What a page of an evaluation shows beside figures: both sets of features, and near copies."""

from typing import Any

import numpy as np

from diffusion_jax.evaluation.extraction import Features
from diffusion_jax.evaluation.images import ImageSet
from diffusion_jax.evaluation.metrics.gaussians import principal_components
from diffusion_jax.evaluation.metrics.nearest import nearest_neighbours
from diffusion_jax.viz.evaluation import Cloud, Pair

PAIRS = 12


def show(
  images: ImageSet, samples: Features, reference_images: ImageSet, reference: Features
) -> dict[str, Any]:
  """Arguments of `viz.evaluation.write_evaluation_page`: clouds of each kind of features, and the
  samples that are most like an image of the reference, by the first kind."""
  clouds = []
  for name, values in samples.columns.items():
    found = principal_components(reference.columns[name], values, k=min(2, values.shape[1]))
    if found.axes.shape[1] == 2:
      clouds.append(Cloud(
        name, found.reference, found.samples, found.reference_share, found.samples_share
      ))
  first = next(iter(samples.columns))
  near = nearest_neighbours(samples.columns[first], reference.columns[first])
  pairs = []
  for row in np.argsort(-near.similarities[:, 0], kind='stable')[:PAIRS]:
    own, other = int(samples.rows[row]), int(reference.rows[near.indices[row, 0]])
    pairs.append(Pair(
      images[own].pixels, reference_images[other].pixels, float(near.similarities[row, 0]),
      f'image {own}',
    ))
  return {'clouds': clouds, 'pairs': pairs}
