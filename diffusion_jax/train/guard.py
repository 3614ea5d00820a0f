"""Steps that would spoil the parameters are skipped: not finite, or far above the usual loss.

Unlike `optax.apply_if_finite`, which lets NaN through after its limit, such a step never changes
parameters, optimizer or average, and after too many in a row no step does, however late the host
looks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.config import GuardConfig

DECAY = 0.98
"""Decay of the running mean and variance of the loss: a memory of some 50 steps."""
SETTLED = 50
"""Steps before a spike can be told from the start of training."""


class Guard(NamedTuple):
  """Skipped steps, and the usual loss; all scalars.

  skipped: so far, for either reason. in_a_row: the latest ones without a good step. used: good
  steps. mean, variance: running, of the losses of good steps.
  """

  skipped: jax.Array
  in_a_row: jax.Array
  used: jax.Array
  mean: jax.Array
  variance: jax.Array

  @classmethod
  def fresh(cls) -> 'Guard':
    whole, real = (lambda: jnp.zeros((), jnp.int32)), (lambda: jnp.zeros((), jnp.float32))
    return cls(whole(), whole(), whole(), real(), real())


def judge(
  guard: Guard, config: GuardConfig, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, jax.Array, Guard]:
  """(use this step, its numbers are finite, the next guard).

  loss: scalar, over the whole batch. norm: scalar, of the gradient before clipping.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  use = finite & (guard.in_a_row < config.max_skipped_in_a_row)
  if config.spike_deviations:
    limit = guard.mean + config.spike_deviations * jnp.sqrt(guard.variance)
    use &= (guard.used < SETTLED) | (loss <= limit)
  # Plain means at first, so that the start at zero leaves no trace.
  weight = jnp.maximum(1 - DECAY, 1 / (guard.used + 1))
  away = jnp.where(use, loss - guard.mean, 0.0)
  mean = guard.mean + weight * away
  variance = (1 - weight) * (guard.variance + weight * jnp.square(away))
  after = Guard(
    skipped=guard.skipped + ~use,
    in_a_row=jnp.where(use, 0, guard.in_a_row + 1),
    used=guard.used + use,
    mean=mean,
    variance=jnp.where(use, variance, guard.variance),
  )
  return use, finite, after


def choose(use: jax.Array, new, old):
  """Return `new` where the step is used, else `old`; pytrees of the same structure."""
  return jax.tree.map(lambda a, b: jnp.where(use, a, b), new, old)
