"""Quality and variety apart: how two sets of features overlap, by balls around neighbours.

Which training images a sample resembles most: what memorisation is looked for by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

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
)


class PrecisionRecall(NamedTuple):
  """Fractions in [0, 1]: of samples within the reference's manifold, and the other way round."""

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
  closed: bool = True, block: int = BLOCK,
) -> PrecisionRecall:
  """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

  A point lies in the manifold of a set if it is within one of the balls around the set's points
  that reach to their k-th nearest neighbour. As torch-fidelity has it balls are closed and k is 3;
  the package prdc has open balls and k = 5. Values depend on n and m: compare only equal numbers of
  the same features.

  Raises:
    UserError: k outside 1 to the smaller count less 1, or features that are empty, not finite or of
      different widths.
  """
  samples, reference = _checked(samples, reference, k)
  fraction = lambda points, centres: float(np.mean(count_in_balls(
    points, centres, neighbour_radii(centres, k, block=block), block=block, closed=closed,
  )[0] > 0))
  return PrecisionRecall(fraction(samples, reference), fraction(reference, samples))


def density_coverage(
  samples: Float[np.ndarray, 'n d'], reference: Float[np.ndarray, 'm d'], *, k: int = 5,
  block: int = BLOCK,
) -> DensityCoverage:
  """Density and coverage (Naeem et al. 2020, eq. 4 and 6), by open balls as in their package prdc.

  Density: balls of the reference that hold a sample, over k, on average. Coverage: fraction of
  those balls that hold a sample at all. UserError as in `precision_recall`.
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
