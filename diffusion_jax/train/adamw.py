"""AdamW in one pass: clipping, moments, decay, factors and learning rate, or nothing at all."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

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

  update(gradients, state, parameters, use=True, norm=None): where `use` is False, a scalar, updates
  are zero and the state stays as it is, whatever the gradients hold. norm: of all gradients, by
  `global_norm`, where it is known.

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
  @partial(jax.jit, static_argnames='decay')
  def one(p, mu, nu, g, scale, use, first, second, rate, *, decay):
    g = g * scale
    mu = lax.select(use, b1 * mu + (1 - b1) * g, mu)
    nu = lax.select(use, b2 * nu + (1 - b2) * jnp.square(g), nu)
    direction = mu * first / (lax.sqrt(nu * second) + eps)
    direction = direction + decay * p if decay else direction
    return (rate * direction).astype(p.dtype), mu, nu

  def update(
    grads: Params, state: optax.ScaleByAdamState, params: Params, *, use=True, norm=None, **_
  ):
    if norm is None or len(trained) < len(grads):
      norm = global_norm([grads[name] for name in trained])
    scale = jnp.minimum(1.0, clip_norm / norm) if clip_norm else 1.0
    use = jnp.asarray(use)
    count = state.count + use
    # Kept apart from zero, as it is before the first update that is used.
    n = jnp.maximum(count, 1).astype(jnp.float32)
    first, second = 1 / (1 - b1**n), 1 / (1 - b2**n)
    rate = jnp.where(use, schedule(state.count), 0.0)
    rates = {factor: -rate * factor for factor in set(factors.values())}
    updates = {name: jnp.zeros_like(p) for name, p in params.items() if not factors[name]}
    mu, nu = dict(state.mu), dict(state.nu)
    for name in trained:
      updates[name], mu[name], nu[name] = one(
        params[name], mu[name], nu[name], grads[name], scale, use, first, second,
        rates[factors[name]], decay=decays[name],
      )
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)
