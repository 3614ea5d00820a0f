"""Quality and variety apart: how two sets of features overlap, by balls around neighbours.

Which training images a sample resembles most: what memorisation is looked for by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import (
  HIGHER,
  OF_SETS,
  POOLED,
  Compared,
  Metric,
  MetricValues,
  Value,
)
from diffusion_jax.evaluation.metrics.pairwise import (
  BLOCK,
  blocks,
  count_in_balls,
  neighbour_radii,
  pair,
  squared_distances,
)


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]: of samples within the reference's manifold, and the other way round."""

  precision: float
  recall: float

  @property
  def f_score(self) -> float:
    """Harmonic mean of both, 0 where both are 0."""
    return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-5)


class DensityCoverage(NamedTuple):
  """Density, 0 or more and 1 for equal distributions, and coverage, in [0, 1]."""

  density: float
  coverage: float


def precision_recall(
  samples: Float[np.ndarray, 'n d'], reference: Float[np.ndarray, 'm d'], *, k: int = 3,
  convention: str = 'torch-fidelity', block: int = BLOCK,
) -> PrecisionRecall:
  """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

  A point lies in the manifold of a set if it is within one of the balls around the set's points
  that reach to their k-th nearest neighbour. The tools differ in this:
  - 'torch-fidelity': closed balls, k = 3, VGG-16's features by default.
  - 'adm': the same balls and k = 3, with Inception's pool3 and 10,000 reference against 50,000
    sampled images; squared distances are computed in float16 while those are finite, which makes
    ties, and ties count as within. Follows its formula, but a GPU may round sums otherwise.
  - 'prdc': open balls, k = 5.
  Figures depend on n and m: compare only equal numbers of the same features.

  Raises:
    UserError: another convention, k outside 1 to the smaller count less 1, or features that are
      empty, not finite or of different widths.
  """
  samples, reference = _checked(samples, reference, k)
  if convention == 'adm':
    return _half_precision_recall(samples, reference, k, block)
  if convention not in ('torch-fidelity', 'prdc'):
    raise UserError(
      f'There is no convention {convention!r} of precision and recall: choose torch-fidelity, adm '
      'or prdc.'
    )
  share = lambda points, centres: float(np.mean(count_in_balls(
    points, centres, neighbour_radii(centres, k, block=block), block=block,
    closed=convention == 'torch-fidelity',
  )[0] > 0))
  return PrecisionRecall(share(samples, reference), share(reference, samples))


def density_coverage(
  samples: Float[np.ndarray, 'n d'], reference: Float[np.ndarray, 'm d'], *, k: int = 5,
  block: int = BLOCK,
) -> DensityCoverage:
  """Density and coverage (Naeem et al. 2020, eq. 4 and 6), by open balls as in their package prdc.

  Density: balls of the reference that hold a sample, over k, on average. Coverage: share of those
  balls that hold a sample at all. UserError as in `precision_recall`.
  """
  samples, reference = _checked(samples, reference, k)
  radii = neighbour_radii(reference, k, block=block)
  by_sample, by_ball = count_in_balls(samples, reference, radii, closed=False, block=block)
  return DensityCoverage(float(by_sample.mean() / k), float((by_ball > 0).mean()))


def _checked(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  samples, reference = pair(samples, reference, None)
  fewest = min(len(samples), len(reference))
  if not 1 <= k < fewest:
    raise UserError(
      f'{fewest} samples have no {k}-th nearest neighbour: choose k from 1 to {fewest - 1}.'
    )
  return samples, reference


def _half_precision_recall(samples, reference, k, block) -> PrecisionRecall:
  samples, reference = (v.astype(np.float32) for v in (samples, reference))

  def share(points: np.ndarray, centres: np.ndarray) -> float:
    radii = np.concatenate([
      _half_radii(rows, centres, k, block)[: len(index)] for index, rows in blocks(centres, block)
    ])
    inside = np.zeros(len(points), bool)
    for index, rows in blocks(points, block):
      for columns, part in blocks(centres, block):
        limits = np.full(len(part), -np.inf, np.float32)
        limits[: len(columns)] = radii[columns.start : columns.stop]
        held = np.asarray((_half_distances(rows, part) <= limits).any(axis=1))
        inside[index.start : index.stop] |= held[: len(index)]
    return float(inside.mean())

  return PrecisionRecall(share(samples, reference), share(reference, samples))


def _half_radii(rows: np.ndarray, centres: np.ndarray, k: int, block: int) -> np.ndarray:
  nearest = np.zeros((len(rows), 0), np.float32)
  for columns, part in blocks(centres, block):
    fresh = np.asarray(_half_distances(rows, part))[:, : len(columns)]
    nearest = np.sort(np.concatenate([nearest, fresh], axis=1), axis=1)[:, : k + 1]
  return nearest[:, k]


@jax.jit
def _half_distances(x: Float[Array, 'n d'], y: Float[Array, 'm d']) -> Float[Array, 'n m']:
  """Squared distances whose every step is rounded to float16; of float32 if one is not finite."""
  u, v = x.astype(jnp.float16), y.astype(jnp.float16)
  norm = lambda w: jnp.square(w).sum(axis=1, dtype=jnp.float32).astype(jnp.float16)
  dot = jnp.matmul(u, v.T, preferred_element_type=jnp.float32).astype(jnp.float16)
  half = jnp.maximum(norm(u)[:, None] - 2 * dot + norm(v), 0)
  finite = jnp.isfinite(half).all()
  return jax.lax.cond(
    finite, lambda: half.astype(jnp.float32), lambda: squared_distances(x, y)
  )


class Neighbours(NamedTuple):
  """The k most similar training images of each of n samples, the most similar first.

  indices: [n k], rows of the training features. similarities: [n k], cosines in [-1, 1].
  """

  indices: Int[np.ndarray, 'n k']
  similarities: Float[np.ndarray, 'n k']


def nearest_neighbours(
  samples: Float[np.ndarray, 'n d'], training: Float[np.ndarray, 'm d'], *, k: int = 1,
  block: int = BLOCK,
) -> Neighbours:
  """Finds the training features of the highest cosine similarity to each sample.

  On the device in float32, `block` samples against `block` training features at a time; of equal
  similarities the lower index comes first.

  Args:
    training: may be memory-mapped: a block of it is read at a time.

  Raises:
    UserError: k outside 1 to m, or features that are empty, not finite or of different widths.
  """
  samples, training = pair(samples, training, None)
  if not 1 <= k <= len(training):
    raise UserError(
      f'{len(training)} training images have no {k} nearest: choose k from 1 to {len(training)}.'
    )
  indices = np.empty((len(samples), k), np.int32)
  similarities = np.empty((len(samples), k), np.float32)
  for rows, x in blocks(samples, block):
    best = jnp.full((len(x), k), -jnp.inf, jnp.float32), jnp.zeros((len(x), k), jnp.int32)
    x = _unit(x)
    for columns, y in blocks(training, block):
      best = _keep_most_similar(*best, x, _unit(y), columns.start, len(columns))
    part = slice(rows.start, rows.stop)
    similarities[part], indices[part] = (np.asarray(v)[: len(rows)] for v in best)
  return Neighbours(indices, np.clip(similarities, -1, 1))


def _unit(x: np.ndarray) -> Float[np.ndarray, 'n d']:
  """Rows of length 1; a zero row stays zero, similar to nothing."""
  length = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1, keepdims=True))
  return np.asarray(x / np.maximum(length, 1e-30), np.float32)


@jax.jit
def _keep_most_similar(values, found, x, y, start, columns):
  fresh = jnp.matmul(x, y.T, precision='highest')
  fresh = jnp.where(jnp.arange(len(y)) < columns, fresh, -jnp.inf)
  index = jnp.broadcast_to(start + jnp.arange(len(y), dtype=jnp.int32), fresh.shape)
  k = values.shape[1]
  values, place = jax.lax.top_k(jnp.concatenate([values, fresh], axis=1), k)
  return values, jnp.take_along_axis(jnp.concatenate([found, index], axis=1), place, axis=1)


def _precision_recall(of: Compared, values: MetricValues, seed: int) -> None:
  """precision, recall."""
  found = precision_recall(of.samples, of.reference)
  values.add(f'precision{of.suffix}', found.precision)
  values.add(f'recall{of.suffix}', found.recall)
  if len(of.samples) != len(of.reference):
    values.warnings.append(
      f'precision{of.suffix} and recall{of.suffix} of {len(of.samples)} samples against '
      f'{len(of.reference)} reference images: compare only figures of these numbers.'
    )


def _density_coverage(of: Compared, values: MetricValues, seed: int) -> None:
  """density, coverage."""
  found = density_coverage(of.samples, of.reference)
  values.add(f'density{of.suffix}', found.density)
  values.add(f'coverage{of.suffix}', found.coverage)


PRECISION_RECALL = Metric('precision_recall', _precision_recall, POOLED, values=(
  Value('precision{suffix}', 'Precision, {features} features', HIGHER, OF_SETS, alone='Precision'),
  Value('recall{suffix}', 'Recall, {features} features', HIGHER, OF_SETS, alone='Recall'),
))
DENSITY_COVERAGE = Metric('density_coverage', _density_coverage, POOLED, values=(
  Value('density{suffix}', 'Density, {features} features', HIGHER, OF_SETS, alone='Density'),
  Value('coverage{suffix}', 'Coverage, {features} features', HIGHER, OF_SETS, alone='Coverage'),
))
