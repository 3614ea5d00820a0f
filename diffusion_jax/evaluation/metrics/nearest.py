"""Which training images a sample resembles most: what memorisation is looked for by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.checks import pair
from diffusion_jax.evaluation.metrics.pairwise import BLOCK, blocks


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
