"""Exponential moving averages of the parameters, and others put together after training.

Karras et al. 2024, section 3.1. An average, like the parameters themselves, is a weighted sum of
the parameters after every update: its profile. The sum of a run's checkpoints whose profile is
nearest to a wanted one in least squares stands for that average; the profiles alone give its error,
before weights are read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion_jax.types import Params


def decay_per_step(halflife_images: float, batch_size: int, step: jax.Array) -> jax.Array:
  """The factor that halves an old weight's fraction every `halflife_images` images.

  Early it is min(decay, (1 + step) / (10 + step)), to forget the random start. step: updates made
  before this one.
  """
  decay = 0.5 ** (batch_size / halflife_images)
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1 + step) / (10 + step))


def update(ema: Params, params: Params, decay: jax.Array) -> Params:
  """Return decay * ema + (1 - decay) * params, in float32."""
  return jax.tree.map(lambda e, p: _moved(e, p, decay), ema, params)


@jax.jit  # So that parameters of one shape are traced once.
def _moved(e: jax.Array, p: jax.Array, decay: jax.Array) -> jax.Array:
  return e + (1 - decay) * (p.astype(e.dtype) - e)


BLOCK = 8192
"""Updates whose weights are in memory at a time."""


class Snapshot(NamedTuple):
  """Weights of a step: an average with that half-life in images, or 0: the parameters."""

  step: int
  halflife_images: float


class Combination(NamedTuple):
  """factors: of the snapshots, of sum 1. error: of the profile, relative, in Euclidean norm."""

  factors: Float[np.ndarray, 'k']
  error: float


def combine(wanted: Snapshot, stored: Sequence[Snapshot], batch_size: int) -> Combination:
  """The sum of stored snapshots nearest to the wanted one, of those up to its step.

  Updates that the guard skipped count as made.
  """
  every = [wanted, *stored]
  logs = {h: log_decays(h, wanted.step, batch_size) for h in {s.halflife_images for s in every}}
  products = np.zeros((len(every), len(every)))
  for start in range(0, wanted.step + 1, BLOCK):
    block = np.arange(start, min(start + BLOCK, wanted.step + 1))
    profiles = np.stack([profile(s, logs[s.halflife_images], block) for s in every])
    products += profiles @ profiles.T
  among, towards, own = products[1:, 1:], products[1:, 0], products[0, 0]
  k = len(stored)
  # Of all sums whose factors add up to 1: Lagrange's conditions, in the units of the diagonal.
  scale = np.sqrt(np.diag(among))
  system = np.block([
    [among / np.outer(scale, scale), 1 / scale[:, None]], [1 / scale[None], np.zeros((1, 1))]
  ])
  found = np.linalg.lstsq(system, np.append(towards / scale, 1.0), rcond=1e-13)[0][:k] / scale
  left = own - 2 * found @ towards + found @ among @ found
  return Combination(found, float(np.sqrt(max(left, 0.0) / own)))


def log_decays(halflife: float, steps: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Logarithms of the decay up to each update and of its own fraction, float64.

  As `ema.decay_per_step`; the first parameters count as an update with fraction 1.
  """
  if not halflife:
    return np.zeros(steps + 1), np.zeros(steps + 1)
  step = np.arange(steps, dtype=np.float64)
  decay = np.minimum(0.5 ** (batch_size / halflife), (1 + step) / (10 + step))
  return (
    np.concatenate([[0.0], np.cumsum(np.log(decay))]),
    np.concatenate([[0.0], np.log1p(-decay)]),
  )


def profile(snapshot: Snapshot, logs: tuple[np.ndarray, np.ndarray], at: np.ndarray) -> np.ndarray:
  """Weights of the parameters after the updates `at` [n], 0 for the first parameters.

  logs: `log_decays` of the snapshot's half-life, up to its step or further.
  """
  if not snapshot.halflife_images:
    return (at == snapshot.step).astype(np.float64)
  decayed, fractions = logs
  weights = np.exp(fractions[at] + np.minimum(decayed[snapshot.step] - decayed[at], 0.0))
  return np.where(at <= snapshot.step, weights, 0.0)
