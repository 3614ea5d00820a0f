"""Which noise levels to train at: times t in [0, 1], sigmas, or timesteps drawn by importance.

Every distribution is a quantile function of u, uniform in [0, 1), so that plain and stratified
draws (`uniform`, `stratified`) serve all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from diffusion_jax.types import PerExample


def uniform(key: jax.Array, count: int) -> PerExample:
  """Independent u [count] in [0, 1)."""
  return jax.random.uniform(key, (count,))


def stratified(key: jax.Array, count: int) -> PerExample:
  """u_i = (u_0 + i / count) mod 1, one random u_0 (Kingma et al. 2021, appendix I.1).

  Each is uniform, together they are evenly spaced: less variance in a batch's mean loss.
  """
  return jnp.mod(jax.random.uniform(key, ()) + jnp.arange(count) / count, 1.0)


def timestep(u: jax.Array, steps: int) -> jax.Array:
  """u in [0, 1) -> integer timestep in [0, steps)."""
  return jnp.clip(jnp.floor(u * steps).astype(int), 0, steps - 1)


def _normal(u: jax.Array) -> jax.Array:
  """Standard normal quantile, finite at 0 and 1."""
  eps = jnp.finfo(u.dtype).eps
  return ndtri(jnp.clip(u, eps, 1 - eps))


def logit_normal(u: jax.Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
  """t with logit(t) ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""
  return jax.nn.sigmoid(mean + std * _normal(u))


def mode(u: jax.Array, scale: float = 1.29) -> jax.Array:
  """t = 1 - v - scale (cos^2(pi v / 2) - 1 + v), v = 1 - u (Esser et al. 2024, eq. 20).

  Written with v = 1 - u so that t grows with u. scale 0 is uniform; above 0 prefers the middle,
  below 0 the ends. Monotone for scale in [-1, 2 / (pi - 2)].
  """
  v = 1 - u
  return u - scale * (jnp.cos(jnp.pi * v / 2) ** 2 - u)


def log_normal(u: jax.Array, mean: float = -1.2, std: float = 1.2) -> jax.Array:
  """sigma (not t) with ln sigma ~ N(mean, std^2), at alpha = 1 (Karras et al. 2022, table 1)."""
  return jnp.exp(mean + std * _normal(u))


class LossHistory(NamedTuple):
  """The last losses at each timestep: losses [T, n], and how many of them are filled, [T]."""

  losses: jax.Array
  count: jax.Array


def init_history(steps: int, length: int = 10) -> LossHistory:
  """No losses seen; the last `length` will be kept."""
  return LossHistory(jnp.zeros((steps, length)), jnp.zeros((steps,), jnp.int32))


def update_history(history: LossHistory, t: jax.Array, loss: PerExample) -> LossHistory:
  """Adds unweighted losses [b] at timesteps t [b], oldest out first; a t may occur repeatedly."""

  def add(history, pair):
    index, value = pair
    row = history.losses[index]
    count = history.count[index]
    full = count >= row.shape[0]
    row = jnp.where(full, jnp.roll(row, -1), row).at[jnp.where(full, -1, count)].set(value)
    counts = history.count.at[index].set(jnp.where(full, count, count + 1))
    return LossHistory(history.losses.at[index].set(row), counts), None

  return jax.lax.scan(add, history, (t, loss.astype(history.losses.dtype)))[0]


def importance(history: LossHistory, uniform_share: float = 0.001) -> jax.Array:
  """Probability [T] of each timestep (Nichol & Dhariwal 2021, eq. 18).

  Proportional to sqrt(E[loss^2]), mixed with a uniform share; uniform until every timestep has as
  many losses as the history holds.
  """
  steps, length = history.losses.shape
  moment = jnp.sqrt((history.losses**2).mean(1))
  total = moment.sum()
  ready = (history.count >= length).all() & (total > 0)
  share = jnp.where(ready, moment / jnp.where(ready, total, 1.0), 1 / steps)
  return (1 - uniform_share) * share + uniform_share / steps


def by_importance(u: jax.Array, probability: jax.Array) -> tuple[jax.Array, PerExample]:
  """(timestep [b], weight [b]) for u [b]; weight = 1 / (T p_t) keeps the mean loss unbiased."""
  steps = len(probability)
  t = jnp.searchsorted(jnp.cumsum(probability), u * probability.sum(), side='right')
  t = jnp.minimum(t, steps - 1)
  return t, 1 / (steps * probability[t])
