"""Mean and covariance of features, summed on the devices that computed them.

Each shard of a batch adds its rows to sums of its own, so that a batch costs one matrix product and
no message between devices. All shards are put together once, at the end. Everything is float32. So
deviations are taken from an origin near the data (the shard's first mean), which keeps features far
from zero exact; sums are merged by Chan's rule, as on the host; and what an addition rounds off is
kept for the next one (Kahan 1965), so that the error does not grow with the number of batches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.layout import BATCH, EXAMPLES
from diffusion_jax.parallel.mesh import to_host


class DeviceStatistics(NamedTuple):
  """Sums of s shards, each on its own device: a pytree that a jitted step may carry and donate.

  Attributes:
    n: [s], feature vectors seen.
    origin: [s d], a point near the features; zeros before the first vector.
    mean: [s d], mean of the vectors less the origin.
    m2: [s*d d], summed outer products of deviations from the mean, d rows for each shard. (With an
      axis of its own for shards, XLA copies a donated matrix on a CPU, which takes twice as long.)
    rounded: [s*d d], what additions to m2 have added too much.
  """

  n: Int[Array, 's']
  origin: Float[Array, 's d']
  mean: Float[Array, 's d']
  m2: Float[Array, 's*d d']
  rounded: Float[Array, 's*d d']


def empty(d: int, mesh: Mesh) -> DeviceStatistics:
  """Statistics of no vectors of width d, a shard on each device that has rows of a batch."""
  s = mesh.shape['data'] * mesh.shape['fsdp']
  make = lambda: DeviceStatistics(
    jnp.zeros(s, jnp.int32), *(jnp.zeros(shape) for shape in ((s, d),) * 2 + ((s * d, d),) * 2)
  )
  return jax.jit(make, out_shardings=NamedSharding(mesh, BATCH))()


def update(
  statistics: DeviceStatistics,
  features: Float[Array, 'b d'],
  valid: Bool[Array, 'b'],
  *,
  mesh: Mesh,
) -> DeviceStatistics:
  """Adds the rows of a batch where `valid` is true; pure, to be jitted with what makes features.

  Args:
    features: of any float type; b is a multiple of the mesh's data x fsdp. Rows that are not
      valid may hold anything.
  """
  add = jax.shard_map(_add, mesh=mesh, in_specs=BATCH, out_specs=BATCH)
  return add(statistics, features.astype(jnp.float32), valid)


def _add(statistics: DeviceStatistics, features: Array, valid: Array) -> DeviceStatistics:
  """One shard's part of `update`: arrays have s = 1 and that shard's rows."""
  n, origin, mean = (x[0] for x in statistics[:3])
  m2, rounded = statistics[3:]
  rows = valid[:, None]
  added = valid.sum(dtype=jnp.int32)
  count = jnp.maximum(added, 1)
  average = lambda x: jnp.where(rows, x, 0).sum(axis=0) / count
  origin = jnp.where(n == 0, average(features), origin)
  shifted = jnp.where(rows, features - origin, 0)
  mean_added = average(shifted)
  centred = jnp.where(rows, shifted - mean_added, 0)
  total = n + added
  share = added / jnp.maximum(total, 1)
  delta = mean_added - mean
  # Chan's term between the two sets, as one more row: it then costs no pass over a matrix.
  centred = jnp.concatenate([centred, (delta * jnp.sqrt(n * share))[None]])
  increment = jnp.matmul(centred.T, centred, precision='highest') - rounded
  m2_total = m2 + increment
  rounded = (m2_total - m2) - increment
  mean = mean + delta * share
  return DeviceStatistics(total[None], origin[None], mean[None], m2_total, rounded)


def collect(statistics: DeviceStatistics, *, mesh: Mesh) -> Statistics:
  """All shards together, on the host in float64, the same on every process.

  Every process of the mesh has to call it. UserError if a feature was NaN or infinite.
  """
  n, origin, mean, m2 = to_host(_collector(mesh)(statistics))
  if not np.isfinite(m2).all():
    raise UserError(
      'The features hold NaN or infinite values: check the images and the extractor weights.'
    )
  m2 = m2.astype(np.float64)
  return Statistics(int(n), origin.astype(np.float64) + mean, (m2 + m2.T) / 2)


@functools.lru_cache(maxsize=8)
def _collector(mesh: Mesh):
  return jax.jit(jax.shard_map(
    _reduce, mesh=mesh, in_specs=BATCH, out_specs=PartitionSpec()
  ))


def _reduce(statistics: DeviceStatistics) -> tuple[Array, Array, Array, Array]:
  """Sums over shards: (n, origin, mean less the origin, m2), Chan's rule for many sets at once."""
  n, origin, mean = (x[0] for x in statistics[:3])
  m2, rounded = statistics[3:]
  over = functools.partial(jax.lax.psum, axis_name=EXAMPLES)
  used = (n > 0).astype(jnp.float32)
  centre = over(origin * used) / jnp.maximum(over(used), 1)
  total = over(n)
  offset = jnp.where(n > 0, (origin - centre) + mean, 0)
  overall = over(offset * (n / jnp.maximum(total, 1)))
  between = (offset - overall) * jnp.sqrt(n.astype(jnp.float32))
  return total, centre, overall, over(
    m2 - rounded + jnp.outer(between, between)
  )
