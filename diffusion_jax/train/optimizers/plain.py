"""Optimizers that are one transformation of optax.

Each is a row of `registry.OPTIMIZERS`: a function (config, learning rate of update n, mask of what
decays), whose own keys are its arguments after the star.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.config import OptimizerConfig
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Fraction, Positive, Range
from diffusion_jax.types import Params

Transformation = optax.GradientTransformationExtraArgs
Mask = dict[str, bool]
"""Which parameters decay."""

Stored = Literal['float32', 'bfloat16', 'float16'] | None
"""Type of a moment; None for that of the parameters."""
NotNegative = Annotated[float, Range(0)]
Decay = Annotated[float, Range(0, 1, below=True)]


def adamw(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *,
  eps_root: NotNegative = 0.0, nesterov: bool = False, mu_dtype: Stored = None,
) -> Transformation:
  """AdamW (Loshchilov & Hutter 2019, algorithm 2). Its state is that of the one-pass AdamW."""
  adam = optax.scale_by_adam(
    config.b1, config.b2, config.eps, eps_root, mu_dtype, nesterov=nesterov
  )

  def update(grads: Params, state, params: Params, **_):
    rate = schedule(state.count)
    updates, state = adam.update(grads, state, params)
    decay = lambda name: config.weight_decay * mask[name] * params[name]
    return {name: -rate * (u + decay(name)) for name, u in updates.items()}, state

  return Transformation(adam.init, update)


def adam(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *,
  eps_root: NotNegative = 0.0, nesterov: bool = False, mu_dtype: Stored = None,
) -> Transformation:
  """Adam (Kingma & Ba 2015); weight_decay is a penalty within the gradient."""
  made = optax.adam(
    schedule, config.b1, config.b2, config.eps, eps_root, mu_dtype, nesterov=nesterov
  )
  return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), made)


def sgd(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *,
  momentum: Decay | None = None, nesterov: bool = False, accumulator_dtype: Stored = None,
) -> Transformation:
  """Gradient descent. weight_decay is within the gradient."""
  made = optax.sgd(schedule, momentum, nesterov, accumulator_dtype)
  return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), made)


def lion(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *, mu_dtype: Stored = None
) -> Transformation:
  """Lion (Chen et al. 2023)."""
  return optax.lion(schedule, config.b1, config.b2, mu_dtype, config.weight_decay, mask)


def lamb(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *, eps_root: NotNegative = 0.0
) -> Transformation:
  """LAMB (You et al. 2020)."""
  return optax.lamb(
    schedule, config.b1, config.b2, config.eps, eps_root, config.weight_decay, mask
  )


def adafactor(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *, factored: bool = True,
  min_dim_size_to_factor: Positive = 128, decay_rate: Fraction = 0.8, decay_offset: int = 0,
  multiply_by_parameter_scale: bool = True, clipping_threshold: NotNegative | None = 1.0,
  momentum: Decay | None = None, dtype_momentum: Stored = 'float32',
  weight_decay_rate: NotNegative | None = None, eps: NotNegative = 1e-30,
) -> Transformation:
  """Adafactor (Shazeer & Stern 2018); here, too, weight_decay is times the learning rate."""
  made = optax.adafactor(
    schedule, min_dim_size_to_factor, decay_rate, decay_offset, multiply_by_parameter_scale,
    clipping_threshold, momentum, dtype_momentum, weight_decay_rate, eps, factored,
  )
  decay = optax.add_decayed_weights(lambda n: -config.weight_decay * schedule(n), mask)
  return optax.chain(made, decay)


LEAST_RATE = 0.1
"""Of Prodigy, whose own learning rate is about 1."""


def prodigy(
  config: OptimizerConfig, schedule: optax.Schedule, mask: Mask, *,
  beta3: Decay | None = None, first_rate: Annotated[float, Range(0, above=True)] = 1e-6,
  growth: Annotated[float, Range(0, above=True)] = 1.0, safeguard_warmup: bool = False,
) -> Transformation:
  """Prodigy (Mishchenko & Defazio 2023, algorithm 4): AdamW that finds its learning rate itself.

  learning_rate and its schedule multiply the rate that is found. beta3: decay of the sums that find
  it, the root of b2 by default. first_rate: its first, lowest value. growth: a factor on what is
  found. safeguard_warmup: sum as if there were no warm-up. UserError: a learning rate far below 1.
  """
  from optax import contrib  # Takes a while, and most runs need none of it.

  if config.learning_rate < LEAST_RATE:
    raise UserError(
      f'optimizer.learning_rate is {config.learning_rate:g}, which prodigy multiplies with the '
      f'rate that it finds; set it to 1, or to at least {LEAST_RATE:g}.'
    )
  # Its own decay would spare nothing.
  made = contrib.prodigy(
    schedule, (config.b1, config.b2), beta3, config.eps, first_rate, growth,
    safeguard_warmup=safeguard_warmup,
  )

  def init(params: Params):
    state = made.init(params)
    return state._replace(params0=jax.tree.map(jnp.copy, params))  # For the others are donated.

  def update(grads: Params, state, params: Params, **_):
    updates, after = made.update(grads, state, params)
    n = after.count.astype(jnp.float32)
    corrected = jnp.sqrt(1 - config.b2**n) / (1 - config.b1**n)
    rate = config.weight_decay * state.estim_lr * schedule(state.count) * corrected
    updates = {name: u - rate * params[name] if mask[name] else u for name, u in updates.items()}
    return updates, after

  return Transformation(init, update)
