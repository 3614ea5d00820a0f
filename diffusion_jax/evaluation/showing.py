"""What a page of an evaluation shows beside figures: features, near copies, prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extract import Features
from diffusion_jax.evaluation.metrics.gaussians import principal_components
from diffusion_jax.evaluation.metrics.logits import class_hits
from diffusion_jax.evaluation.metrics.manifold import nearest_neighbours
from diffusion_jax.evaluation.metrics.text import clip_score_of_each
from diffusion_jax.evaluation.pieces import Thumbnails
from diffusion_jax.viz.evaluation import ClassRow, Cloud, Pair, Prompt

PAIRS, PROMPTS, CLASSES = 12, 12, 5
MOST_IN_CLOUD = 5000


def clouds(samples: Features, reference: Features) -> list[Cloud]:
  """Both sets on the leading axes of the reference, for each kind of features.

  Of larger sets some, evenly chosen: a plot shows no more.
  """
  some = lambda values: values[:: -(-len(values) // MOST_IN_CLOUD)]
  found = []
  for name, values in samples.columns.items():
    if values.shape[1] >= 2:
      axes = principal_components(some(reference.columns[name]), some(values), k=2)
      found.append(Cloud(
        name, axes.reference, axes.samples, axes.reference_share, axes.samples_share
      ))
  return found


def near_copies(
  samples: Features, pictures: Thumbnails, reference: Features, reference_pictures: Thumbnails
) -> list[Pair]:
  """The samples that are most like an image of the reference, by the first kind of features.

  None where there are no pictures to show.
  """
  if pictures[0] is None or reference_pictures[0] is None:
    return []
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


def reconstructions(
  samples: Features, pictures: Thumbnails, originals: Thumbnails
) -> dict[str, list[Pair]]:
  """Those nearest to their originals and those farthest, by PSNR, each beside its original."""
  each = samples.each.get('psnr')
  if each is None:
    return {}
  order = np.argsort(each, kind='stable')

  def shown(rows) -> list[Pair]:
    found = [(int(samples.rows[row]), float(each[row])) for row in rows]
    pairs = [(pictures[number], originals[number], number, value) for number, value in found]
    return [
      Pair(picture, original, value, f'image {number}')
      for picture, original, number, value in pairs if picture is not None and original is not None
    ]

  return {'best': shown(order[::-1][:PAIRS]), 'worst': shown(order[:PAIRS])}


def class_numbers(labels: Sequence[str], classes: Sequence[str]) -> Int[np.ndarray, 'n']:
  """Names of classes -> which logits stand for them. UserError, with the name, for another."""
  numbers = {name: number for number, name in enumerate(classes)}
  unknown = sorted(set(labels) - set(numbers))
  if unknown:
    raise UserError(
      f'the classifier has no class {unknown[0]!r}, which captions are of (it has '
      f'{", ".join(classes)}); give the one of these labels, or leave out class_accuracy.'
    )
  return np.asarray([numbers[label] for label in labels], np.int64)


def worst_classes(
  columns: Mapping[str, tuple[Features, np.ndarray]], logits: str, classes: Sequence[str]
) -> list[ClassRow]:
  """The classes that the first column has least often right.

  Args:
    columns: features, and numbers of the classes [total] that the images should be of.
    logits: name of the features that are logits.
  """
  hits, true = {}, {}
  for name, (features, numbers) in columns.items():
    true[name] = numbers[features.rows]
    hits[name] = class_hits(features.columns[logits], true[name])
  first = next(iter(columns))
  rows = [
    ClassRow(classes[k], int((true[first] == k).sum()), {
      name: float(hits[name][true[name] == k].mean()) if (true[name] == k).any() else float('nan')
      for name in columns
    })
    for k in np.unique(true[first])
  ]
  return sorted(rows, key=lambda row: row.accuracies[first])[:CLASSES]
