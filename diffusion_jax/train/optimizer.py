"""Optimizers by name, with warm-up, decay, clipping, a weight-decay mask and groups by name."""

import re

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.backend import cpu
from diffusion_jax.config import OptimizerConfig
from diffusion_jax.errors import UserError
from diffusion_jax.train.optimizers.moments import stored
from diffusion_jax.train.optimizers.plain import Mask, Transformation
from diffusion_jax.train.optimizers.schedule_free import Around
from diffusion_jax.types import Params


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Return the learning rate of update n = 0, 1, ...: a warm-up, then the schedule."""
  peak, floor = config.learning_rate, config.learning_rate * config.final_fraction
  after = max(total_steps - config.warmup_steps, 1)
  decay = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, floor, after),
    'cosine': lambda: optax.cosine_decay_schedule(peak, after, config.final_fraction),
  }[config.schedule]()
  if not config.warmup_steps:
    return decay
  # (n + 1) / warmup, so that the first update is not lost on a learning rate of zero.
  rise = lambda n: peak * (n + 1) / config.warmup_steps
  return optax.join_schedules([rise, decay], [config.warmup_steps])


def decay_mask(params: Params) -> Mask:
  """Return True for matrices and convolutions; norms, biases, single vectors and scales are spared.

  So are tables of positions and of shifts and scales, and the norms of DoRA.
  """
  tables = ('pos_embed', 'scale_shift_table', 'lora.magnitude')
  return {name: leaf.ndim >= 2 and not name.endswith(tables) for name, leaf in params.items()}


def group_factors(params: Params, groups: tuple) -> dict[str, float]:
  """The learning rate factor of every parameter; UserError for a pattern that matches none."""
  factors, used = {}, set()
  for name in params:
    hit = next((i for i, (pattern, _) in enumerate(groups) if re.search(pattern, name)), None)
    factors[name] = 1.0 if hit is None else float(groups[hit][1])
    used.add(hit)
  unused = [groups[i][0] for i in range(len(groups)) if i not in used]
  if unused:
    raise UserError(f'optimizer.groups pattern {unused[0]!r} matches no parameter; correct it.')
  return factors


FUSED = {('adamw', 'cpu'): cpu.adamw}
"""Optimizers that a platform has in one pass, with clipping and factors."""


def make_optimizer(
  config: OptimizerConfig, params: Params, total_steps: int, platform: str
) -> Transformation:
  """The config's optimizer: clip, update, group factors, in this order; moments stored as it says.

  update(gradients, state, parameters, use=True, norm=None): where scalar `use` is False, updates
  are zero and the state stays. norm: of all gradients, if known; clipping is by the global norm of
  the trained groups. platform: of the mesh, such as 'cpu'. UserError: unknown name, a group without
  parameters, or what the optimizer cannot do.
  """
  schedule, mask = learning_rate_schedule(config, total_steps), decay_mask(params)
  factors = group_factors(params, config.groups)
  around = lambda made: made
  if (fused := FUSED.get((config.name, platform))) and not config.options:
    made = fused(
      schedule, config.b1, config.b2, config.eps, clip_norm=config.clip_norm, factors=factors,
      decays={name: config.weight_decay * decayed for name, decayed in mask.items()},
    )
  else:
    made = config.transformation(schedule, mask)
    if isinstance(made, Around):
      made, around = made.within, made.around
    made = _guarded(optax.with_extra_args_support(made), config.clip_norm, factors)
  if config.moments != 'float32':
    made = stored(made, config.moments, config.name)
    jax.eval_shape(made.init, params)  # Which fails where there is nothing to store.
  return around(made)


def _guarded(made: Transformation, clip_norm: float, factors: dict[str, float]) -> Transformation:
  """Return the optimizer with clipping, factors, and a switch that leaves everything as it is."""
  trained = [name for name, factor in factors.items() if factor]

  def update(grads: Params, state, params: Params, *, use=True, norm=None, **_):
    if norm is None or len(trained) < len(grads):
      norm = cpu.global_norm([grads[name] for name in trained])
    scale = jnp.minimum(1.0, clip_norm / norm) if clip_norm else 1.0
    grads = {name: g * scale * bool(factors[name]) for name, g in grads.items()}
    updates, after = made.update(grads, state, params)
    updates = {
      name: jnp.where(use, factors[name] * u, 0.0).astype(u.dtype) for name, u in updates.items()
    }
    return updates, jax.tree.map(lambda a, b: jnp.where(use, a, b), after, state)

  return Transformation(made.init, update)


def gradients_at(state: optax.OptState, params: Params) -> Params:
  """Return the parameters at which the gradient is taken, where the optimizer says otherwise."""
  return state.gradients_at(params) if hasattr(state, 'gradients_at') else params


def learning_rates(config: OptimizerConfig, total_steps: int) -> dict[str, optax.Schedule]:
  """Return the schedules to log: 'learning_rate', and one for every group with another factor."""
  base = learning_rate_schedule(config, total_steps)
  rates = {'learning_rate': base}
  for pattern, factor in config.groups:
    if factor != 1:
      label = re.sub(r'\W+', '_', pattern).strip('_')
      rates[f'learning_rate/{label}'] = lambda n, f=factor: base(n) * f
  return rates
