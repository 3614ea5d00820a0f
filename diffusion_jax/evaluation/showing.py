"""What a page of an evaluation shows beside figures: features, near copies, prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_jax.evaluation.extraction import Features
from diffusion_jax.evaluation.keeping import Thumbnails
from diffusion_jax.evaluation.metrics.gaussians import principal_components
from diffusion_jax.evaluation.metrics.nearest import nearest_neighbours
from diffusion_jax.evaluation.metrics.text import clip_score_of_each
from diffusion_jax.viz.evaluation import Cloud, Pair, Prompt

PAIRS, PROMPTS = 12, 12


def clouds(samples: Features, reference: Features) -> list[Cloud]:
  """Both sets on the leading axes of the reference, for each kind of features."""
  found = []
  for name, values in samples.columns.items():
    if values.shape[1] >= 2:
      axes = principal_components(reference.columns[name], values, k=2)
      found.append(Cloud(
        name, axes.reference, axes.samples, axes.reference_share, axes.samples_share
      ))
  return found


def near_copies(
  samples: Features, pictures: Thumbnails, reference: Features, reference_pictures: Thumbnails
) -> list[Pair]:
  """The samples that are most like an image of the reference, by the first kind of features."""
  first = next(iter(samples.columns))
  near = nearest_neighbours(samples.columns[first], reference.columns[first])
  pairs = []
  for row in np.argsort(-near.similarities[:, 0], kind='stable')[:PAIRS]:
    own, other = int(samples.rows[row]), int(reference.rows[near.indices[row, 0]])
    both = pictures[own], reference_pictures[other]
    if all(picture is not None for picture in both):
      pairs.append(Pair(*both, float(near.similarities[row, 0]), f'image {own}'))
  return pairs


def best_and_worst(
  samples: Features, pictures: Thumbnails, column: str, texts: np.ndarray, captions: Sequence[str]
) -> dict[str, Any]:
  """The samples that fit their captions best and worst, by CLIP score.

  Args:
    texts: [total d], embeddings of all captions.
  """
  each = clip_score_of_each(samples.columns[column], texts[samples.rows])
  order = np.argsort(each, kind='stable')

  def shown(rows) -> list[Prompt]:
    found = [(pictures[int(samples.rows[row])], row) for row in rows]
    return [
      Prompt(picture, captions[int(samples.rows[row])], float(each[row]))
      for picture, row in found if picture is not None
    ]

  return {'best': shown(order[::-1][:PROMPTS]), 'worst': shown(order[:PROMPTS])}
