"""AdamW in one pass: clipping, moments, decay, factors and learning rate, or nothing at all."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.sums import of_squares
from diffusion_jax.types import Params


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves, float32. Scalar."""
  return jnp.sqrt(of_squares(jax.tree.leaves(tree)))


def adamw(
  schedule: optax.Schedule, b1: float, b2: float, eps: float, *, clip_norm: float,
  decays: Mapping[str, float], factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
  """AdamW (Loshchilov & Hutter 2019, algorithm 2) on parameters by name.

  update(gradients, state, parameters, use=True): where `use` is False, a scalar, updates are zero
  and the state stays as it is, whatever the gradients hold.

  Args:
    schedule: learning rate of update n = 0, 1, ...
    clip_norm: largest norm of the gradient over all that is trained; 0 for none.
    decays: weight decay of each parameter, times the learning rate.
    factors: on the learning rate of each parameter; what has 0 is not trained.
  """
  trained = [name for name, factor in factors.items() if factor]

  def init(params: Params) -> optax.ScaleByAdamState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  # Jitted, so that what is alike for all parameters of one shape is traced once.
  @jax.jit
  def moments(mu, nu, g, scale, use) -> tuple[jax.Array, jax.Array]:
    g = g * scale
    first, second = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * jnp.square(g)
    return jnp.where(use, first, mu), jnp.where(use, second, nu)

  @jax.jit
  def move(p, mu, nu, first, second, rate, factor, decay) -> jax.Array:
    direction = mu * first / (jnp.sqrt(nu * second) + eps)
    return (-rate * factor * (direction + decay * p)).astype(p.dtype)

  def update(grads: Params, state: optax.ScaleByAdamState, params: Params, *, use=True, **_):
    scale = clipping({name: grads[name] for name in trained}, clip_norm)
    mu, nu = dict(state.mu), dict(state.nu)
    for name in trained:
      mu[name], nu[name] = moments(mu[name], nu[name], grads[name], scale, use)
    count = state.count + use
    # Kept apart from zero, as it is before the first update that is used.
    n = jnp.maximum(count, 1).astype(jnp.float32)
    first, second = 1 / (1 - b1**n), 1 / (1 - b2**n)
    rate = jnp.where(use, schedule(state.count), 0.0)

    def step(name: str, p: jax.Array) -> jax.Array:
      if not factors[name]:
        return jnp.zeros_like(p)
      return move(p, mu[name], nu[name], first, second, rate, factors[name], decays[name])

    updates = {name: step(name, p) for name, p in params.items()}
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def clipping(grads: Params, clip_norm: float) -> jax.Array | float:
  """What gradients are multiplied with, so that their norm is at most `clip_norm`, if not 0."""
  return jnp.minimum(1.0, clip_norm / global_norm(grads)) if clip_norm else 1.0
