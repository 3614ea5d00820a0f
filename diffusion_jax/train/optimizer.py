"""AdamW with warm-up, decay, clipping, a weight-decay mask and learning-rate groups by name."""

import dataclasses
import re

import optax

from diffusion_jax.backend.cpu import adamw
from diffusion_jax.errors import UserError
from diffusion_jax.types import Params

SCHEDULES = ('constant', 'linear', 'cosine')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov & Hutter 2019).

  learning_rate: peak. schedule: constant, linear or cosine, from the end of the warm-up to the last
  step, ending at final_fraction of the peak. clip_norm: largest global gradient norm, 0 for none.
  groups: (regular expression over parameter names, factor on the learning rate); the first that
  matches counts, factor 0 freezes, no match means 1.
  """

  learning_rate: float = 1e-4
  schedule: str = 'constant'
  warmup_steps: int = 0
  final_fraction: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  groups: tuple = ()

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise UserError(
        f'optimizer.schedule is {self.schedule!r}; choose one of {", ".join(SCHEDULES)}.'
      )
    for group in self.groups:
      if len(group) != 2 or not isinstance(group[0], str) or not isinstance(group[1], (int, float)):
        raise UserError(f'optimizer.groups has {group!r}; each must be (pattern, factor).')


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Learning rate of update n = 0, 1, ...: rises over the warm-up, then follows the schedule."""
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


def decay_mask(params: Params) -> dict[str, bool]:
  """True for matrices and convolutions; norms, biases, single vectors and scales are spared.

  So are tables of positions, which are not learned.
  """
  return {name: leaf.ndim >= 2 and not name.endswith('pos_embed') for name, leaf in params.items()}


def group_factors(params: Params, groups: tuple) -> dict[str, float]:
  """Factor on the learning rate of every parameter.

  Raises:
    UserError: when a pattern matches no parameter, as it then does nothing.
  """
  factors, used = {}, set()
  for name in params:
    hit = next((i for i, (pattern, _) in enumerate(groups) if re.search(pattern, name)), None)
    factors[name] = 1.0 if hit is None else float(groups[hit][1])
    used.add(hit)
  unused = [groups[i][0] for i in range(len(groups)) if i not in used]
  if unused:
    raise UserError(f'optimizer.groups pattern {unused[0]!r} matches no parameter; correct it.')
  return factors


def make_optimizer(
  config: OptimizerConfig, params: Params, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Clip, Adam, decoupled weight decay, group factors, learning rate, in this order.

  Clipping takes one global norm over the groups that are trained.
  """
  mask = decay_mask(params)
  return adamw(
    learning_rate_schedule(config, total_steps), config.b1, config.b2, config.eps,
    clip_norm=config.clip_norm, factors=group_factors(params, config.groups),
    decays={name: config.weight_decay * decayed for name, decayed in mask.items()},
  )


def learning_rates(config: OptimizerConfig, total_steps: int) -> dict[str, optax.Schedule]:
  """Schedules to log: 'learning_rate', and one more for every group with another factor."""
  base = learning_rate_schedule(config, total_steps)
  rates = {'learning_rate': base}
  for pattern, factor in config.groups:
    if factor != 1:
      label = re.sub(r'\W+', '_', pattern).strip('_')
      rates[f'learning_rate/{label}'] = lambda n, f=factor: base(n) * f
  return rates
