"""Schedule-free AdamW: the parameters are an average, and gradients are taken beside it.

Defazio et al. 2024, equations 3 to 5. Of its three sequences the parameters of the training state
are x, the average: what is sampled, scored, exported, averaged further and begun from. z, which the
updates move, is in the optimizer's state; the gradient is taken at y = (1 - b1) z + b1 x, which is
made within the step. (optax keeps y and z, so that x would have to be made wherever it is used.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.config import OptimizerConfig
from diffusion_jax.errors import UserError
from diffusion_jax.train.optimizers.plain import Mask, NotNegative, Transformation
from diffusion_jax.types import Params


class ScheduleFreeState(NamedTuple):
  """b1: share of the average in y. count: updates made. weights: of all z in x, summed. largest:
  learning rate so far. z: by name. within: state of what moves z."""

  b1: jax.Array
  count: jax.Array
  weights: jax.Array
  largest: jax.Array
  z: Params
  within: Any

  def gradients_at(self, params: Params) -> Params:
    """Return y for parameters x."""
    return jax.tree.map(lambda x, z: (1 - self.b1) * z + self.b1 * x, params, self.z)


@dataclasses.dataclass(frozen=True)
class Around:
  """An optimizer around another, which is clipped, grouped and stored before.

  around: takes that as update(gradients, state, parameters, use=..., norm=...).
  """

  within: Transformation
  around: Callable[[Transformation], Transformation]


def schedule_free(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *, weight_power: NotNegative = 2.0
) -> Around:
  """Schedule-free AdamW; b1 is the average's share in y, b2, eps and weight_decay are AdamW's.

  weight_power: of the largest learning rate so far, as the weight of an update in the average.
  UserError: a schedule that falls, or no b1.
  """
  if config.schedule != 'constant':
    raise UserError(
      f'optimizer.schedule is {config.schedule!r}, but schedule_free averages where others lower '
      "the learning rate; set it to 'constant'."
    )
  if not 0 < config.b1 < 1:
    raise UserError(
      f'optimizer.b1 is {config.b1:g}, the share of the average at which schedule_free takes '
      'gradients; give a number between 0 and 1, such as 0.9.'
    )
  # Without a first moment, whose place the average takes.
  within = optax.chain(
    optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
    optax.add_decayed_weights(config.weight_decay, mask), optax.scale_by_learning_rate(schedule),
  )
  return Around(
    optax.with_extra_args_support(within),
    lambda made: _averaging(made, schedule, config.b1, weight_power),
  )


def _averaging(
  made: Transformation, schedule: optax.Schedule, b1: float, weight_power: float
) -> Transformation:
  real = lambda value: jnp.full((), value, jnp.float32)

  def init(params: Params) -> ScheduleFreeState:
    z = jax.tree.map(jnp.copy, params)  # For the parameters are donated beside it.
    count = jnp.zeros((), jnp.int32)
    return ScheduleFreeState(real(b1), count, real(0), real(0), z, made.init(params))

  def update(grads: Params, state: ScheduleFreeState, params: Params, *, use=True, norm=None, **_):
    moved, within = made.update(
      grads, state.within, state.gradients_at(params), use=use, norm=norm
    )
    z = jax.tree.map(jnp.add, state.z, moved)
    largest = jnp.maximum(state.largest, schedule(state.count))
    weight = jnp.where(use, largest**weight_power, 0.0)
    weights = state.weights + weight
    share = jnp.where(weights > 0, weight / jnp.where(weights > 0, weights, 1.0), 0.0)
    updates = jax.tree.map(lambda new, x: (share * (new - x)).astype(x.dtype), z, params)
    return updates, ScheduleFreeState(
      state.b1, state.count + use, weights, jnp.where(use, largest, state.largest), z, within
    )

  return Transformation(init, update)
