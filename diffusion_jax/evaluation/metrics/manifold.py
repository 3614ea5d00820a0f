"""Neighbours among features: precision and recall, density and coverage, near copies of training.

Distances are made block by block, in bounded memory. The device's float32 |x|^2 + |y|^2 - 2 x.y has
a bounded error: decisions within it are made again on the host in float64 from differences, so
results do not depend on the device, nor on how far features are from zero.
"""

from __future__ import annotations

from collections.abc import Iterator
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
  pair,
)

BLOCK = 4096
_MARGIN = 8  # Neighbours kept beyond those asked for, so that rounding seldom hides one.
_CROWDED = 0.01  # Above this fraction of undecided pairs, a product in float64 is quicker.
_CHUNK = 1 << 22  # Numbers at a time where differences are written out.


def blocks(x: np.ndarray, size: int) -> Iterator[tuple[range, np.ndarray]]:
  """Yield (indices, rows) of x; all have one shape, so the last is padded with zeros."""
  size = min(size, len(x))
  for start in range(0, len(x), size):
    rows = x[start : start + size]
    padding = size - len(rows)
    if padding:
      rows = np.concatenate([rows, np.zeros((padding, *x.shape[1:]), x.dtype)])
    yield range(start, start + size - padding), rows


def squared_distances(x: Float[Array, 'n d'], y: Float[Array, 'm d']) -> Float[Array, 'n m']:
  """Return |x - y|^2 of all pairs, by one product of full float32 precision; centre both first."""
  dot = jnp.matmul(x, y.T, precision='highest')
  return jnp.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * dot, 0)


def centred(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return both less the mean of y, float32: large common parts would cost the product digits."""
  centre = y.mean(axis=0, dtype=np.float64)
  return tuple(np.asarray(v - centre, np.float32) for v in (x, y))


def exact_squared(x: Float[np.ndarray, 'p d'], y: Float[np.ndarray, 'p d']) -> np.ndarray:
  """Return |x - y|^2 of given pairs [p], in float64 from differences; as for (y, x)."""
  out = np.empty(len(x))
  step = max(_CHUNK // x.shape[1], 1)
  for start in range(0, len(x), step):
    part = slice(start, start + step)
    out[part] = np.square(x[part].astype(np.float64) - y[part]).sum(axis=1)
  return out


def neighbour_radii(
  x: Float[np.ndarray, 'n d'], k: int, *, block: int = BLOCK
) -> Float[np.ndarray, 'n']:
  """Return the squared distance of each row to its k-th nearest other row, float64; k < n."""
  small, _ = centred(x, x)
  kept = min(k + 1 + _MARGIN, len(x))
  out = np.empty(len(x))
  undecided = []
  for rows, part in blocks(small, block):
    values, found = _smallest(part, small, kept, block)
    values, found = values[: len(rows)], found[: len(rows)]
    radii = _kth_of(x, np.asarray(rows), found, k)
    out[rows.start : rows.stop] = radii
    # Any row that was not kept is at least this far away: |y|^2 <= 2 |x|^2 + 2 |x - y|^2.
    rounding, norm = _rounding(x.shape[1]), np.square(part[: len(rows)]).sum(axis=1)
    beyond = values[:, -1] * (1 - 2 * rounding) - 3 * rounding * norm
    sure = (radii <= beyond) | (radii == 0) | (kept == len(x))
    undecided.extend(np.asarray(rows)[~sure])
  for start in range(0, len(undecided), 512):
    chosen = np.asarray(undecided[start : start + 512])
    found = _smallest_in_float64(x, chosen, kept, block)
    out[chosen] = _kth_of(x, chosen, found, k)
  return out


def _kth_of(x: np.ndarray, rows: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
  """The k-th smallest distance of x[rows] to x[found], [r c], the row itself being the zeroth."""
  count = found.shape[1]
  exact = np.empty(found.shape)
  step = max(_CHUNK // (count * x.shape[1]), 1)
  for start in range(0, len(rows), step):
    part = slice(start, start + step)
    own = np.repeat(rows[part], count)
    exact[part] = exact_squared(x[own], x[found[part].ravel()]).reshape(-1, count)
  return np.sort(exact, axis=1)[:, k]


def _rounding(d: int) -> float:
  """Error of `squared_distances` of width d, as a fraction of |x|^2 + |y|^2."""
  return (d + 32) * 2.0**-24


def _smallest(
  x: np.ndarray, y: np.ndarray, count: int, block: int
) -> tuple[Float[np.ndarray, 'n c'], Int[np.ndarray, 'n c']]:
  """(squared distances, indices) of the `count` rows of y nearest to each row of x, ascending."""
  values = jnp.full((len(x), count), jnp.inf, jnp.float32)
  found = jnp.zeros((len(x), count), jnp.int32)
  for columns, part in blocks(y, block):
    values, found = _keep_smallest(values, found, x, part, columns.start, len(columns))
  return np.asarray(values, np.float64), np.asarray(found)


@jax.jit
def _keep_smallest(values, found, x, y, start, columns):
  fresh = jnp.where(jnp.arange(len(y)) < columns, squared_distances(x, y), jnp.inf)
  index = jnp.broadcast_to(start + jnp.arange(len(y), dtype=jnp.int32), fresh.shape)
  values = jnp.concatenate([values, fresh], axis=1)
  found = jnp.concatenate([found, index], axis=1)
  lowest, place = jax.lax.top_k(-values, found.shape[1] - len(y))
  return -lowest, jnp.take_along_axis(found, place, axis=1)


def _smallest_in_float64(x: np.ndarray, rows: np.ndarray, count: int, block: int) -> np.ndarray:
  values, found = np.full((len(rows), 0), np.inf), np.zeros((len(rows), 0), int)
  for start in range(0, len(x), block):
    fresh = _product_in_float64(x[rows], x[start : start + block], x[rows].mean(axis=0))
    index = np.broadcast_to(np.arange(start, start + fresh.shape[1]), fresh.shape)
    values, found = np.concatenate([values, fresh], 1), np.concatenate([found, index], 1)
    if values.shape[1] > count:
      place = np.argpartition(values, count - 1, axis=1)[:, :count]
      values, found = (np.take_along_axis(v, place, axis=1) for v in (values, found))
  return found


def _product_in_float64(x: np.ndarray, y: np.ndarray, centre: np.ndarray) -> np.ndarray:
  x, y = (v.astype(np.float64) - centre for v in (x, y))
  squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
  return np.maximum(squares - 2 * (x @ y.T), 0)


def count_in_balls(
  points: Float[np.ndarray, 'n d'], centres: Float[np.ndarray, 'm d'],
  radii: Float[np.ndarray, 'm'], *, closed: bool, block: int = BLOCK,
) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'm']]:
  """(balls that hold each point, points in each ball); radii: squared; closed: with the surface."""
  inside = np.less_equal if closed else np.less
  small_points, small_centres = centred(points, centres)
  by_point, by_ball = np.zeros(len(points), int), np.zeros(len(centres), int)
  for rows, x in blocks(small_points, block):
    of_rows = slice(rows.start, rows.stop)
    for columns, y in blocks(small_centres, block):
      limits = np.zeros(len(y), np.float32)
      limits[: len(columns)] = radii[columns.start : columns.stop]
      sure, unsure = _compare(x, y, limits)
      sure = np.array(sure)[: len(rows), : len(columns)]
      unsure = np.asarray(unsure)[: len(rows), : len(columns)]
      if unsure.any():
        _decide(
          sure, unsure, points[of_rows], centres[columns.start : columns.stop],
          radii[columns.start : columns.stop], inside,
        )
      by_point[of_rows] += sure.sum(axis=1)
      by_ball[columns.start : columns.stop] += sure.sum(axis=0)
  return by_point, by_ball


@jax.jit
def _compare(x, y, limits):
  """Pairs that are within for sure, and those that rounding leaves undecided."""
  norms = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)
  # The limits are rounded to float32 themselves.
  tolerance = norms * _rounding(x.shape[1]) + limits * 1e-6
  excess = squared_distances(x, y) - limits
  return excess < -tolerance, jnp.abs(excess) <= tolerance


def _decide(sure, unsure, points, centres, radii, inside) -> None:
  if unsure.mean() > _CROWDED:
    distances = _product_in_float64(points, centres, centres.mean(axis=0))
    size = np.square(points - centres.mean(axis=0)).sum(axis=1).max() + distances.max()
    tolerance = (points.shape[1] + 32) * 2.0**-51 * size
    sure |= unsure & (distances < radii - tolerance)
    unsure = unsure & (np.abs(distances - radii) <= tolerance)
  i, j = np.nonzero(unsure)
  for start in range(0, len(i), _CHUNK // points.shape[1] + 1):
    part = slice(start, start + _CHUNK // points.shape[1] + 1)
    exact = exact_squared(points[i[part]], centres[j[part]])
    sure[i[part], j[part]] = inside(exact, radii[j[part]])


class PrecisionRecall(NamedTuple):
  """Fractions in [0, 1]: of samples within the reference's manifold, and the other way round."""

  precision: float
  recall: float


class DensityCoverage(NamedTuple):
  """Density, 0 or more and 1 for equal distributions, and coverage, in [0, 1]."""

  density: float
  coverage: float


def precision_recall(
  samples: Float[np.ndarray, 'n d'], reference: Float[np.ndarray, 'm d'], *, k: int = 3,
  closed: bool = True, block: int = BLOCK,
) -> PrecisionRecall:
  """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

  A set's manifold is the union of balls around its points to their k-th nearest neighbour: closed
  and k = 3 in torch-fidelity, open and k = 5 in prdc. Compare only equal n, m and features.
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
  """Density and coverage (Naeem et al. 2020, eq. 4 and 6), by open balls as in prdc.

  Density: mean number of reference balls that hold a sample, over k. Coverage: fraction of those
  balls that hold one. UserError as in `precision_recall`.
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
  """The k most similar training images of n samples, best first: indices and cosines, [n k]."""

  indices: Int[np.ndarray, 'n k']
  similarities: Float[np.ndarray, 'n k']


def nearest_neighbours(
  samples: Float[np.ndarray, 'n d'], training: Float[np.ndarray, 'm d'], *, k: int = 1,
  block: int = BLOCK,
) -> Neighbours:
  """The training features of the highest cosine similarity to each sample; ties by index.

  On the device in float32, by blocks; `training` may be memory-mapped. UserError: k outside 1 to m,
  or features that are empty, not finite or of different widths.
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
  found = precision_recall(of.samples, of.reference)
  values.add(f'precision{of.suffix}', found.precision)
  values.add(f'recall{of.suffix}', found.recall)
  if len(of.samples) != len(of.reference):
    values.warnings.append(
      f'precision{of.suffix} and recall{of.suffix} of {len(of.samples)} samples against '
      f'{len(of.reference)} reference images: compare only values of these numbers.'
    )


def _density_coverage(of: Compared, values: MetricValues, seed: int) -> None:
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
