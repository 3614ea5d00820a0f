"""Sweeps: every combination of several settings of sampling."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.samplers import info, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.metrics.metric import LOWER, value_of
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.options import GUIDES
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.types import Condition

EMA = 'ema_halflife_images'


def interval(text: str) -> tuple[float, float | None]:
  """LOW:HIGH, noise levels sigma / alpha; a HIGH of inf is no bound."""
  low, high = map(float, text.split(':'))
  return low, None if math.isinf(high) else high


KINDS: dict[str, Callable[[str], Any]] = {
  'guidance': float, 'steps': int, 'sampler': str, 'spacing': str, 'guidance_rescale': float,
  'image_guidance': float, 'clip_skip': int, EMA: float, 'guidance_kind': str, 'eta': float,
  'guidance_interval': interval, 'perturbed_attention': float, 'autoguidance': float,
  **{name: float for name in GUIDES}, **{f'{name}_every': int for name in GUIDES},
}
"""Settings that may be swept: fields of `SampleConfig`, and the average's length."""
OR = 'or'
"""What stands between sweeps that are taken together."""
_EXAMPLES = {interval: '0.2:5', int: '4', float: '4.0', str: 'name'}

Combination = dict[str, Any]


def combinations(texts: Sequence[str]) -> list[Combination]:
  """Every combination of one value of each 'NAME=A,B', the last name fastest; or UserError.

  Several sweeps with OR between them are one after another; what they share is there once.
  """
  found: list[Combination] = []
  groups = [list(group) for is_or, group in itertools.groupby(texts, OR.__eq__) if not is_or]
  if not groups:
    raise UserError('the sweep has no values; give NAME=A,B.')
  for group in groups:
    found += [one for one in _combined(group) if one not in found]
  return found


def _combined(texts: Sequence[str]) -> list[Combination]:
  swept: dict[str, list[Any]] = {}
  for text in texts:
    name, equals, values = text.partition('=')
    if not equals or name not in KINDS:
      raise UserError(
        f'sweep {text} is not of the form NAME=A,B with a NAME of {", ".join(KINDS)}.'
      )
    if name in swept:
      raise UserError(f'sweep names {name} twice; give all of its values at once.')
    try:
      swept[name] = [KINDS[name](value) for value in values.split(',')]
    except ValueError:
      raise UserError(
        f'sweep {text}: {name} takes values like {_EXAMPLES[KINDS[name]]}, split by commas.'
      ) from None
    if len(set(swept[name])) < len(swept[name]):
      raise UserError(f'sweep {text} has a value twice; name each once.')
  return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def applied(sample: SampleConfig, combination: Mapping[str, Any]) -> SampleConfig:
  """Return the settings with those of a combination."""
  return dataclasses.replace(sample, **{k: v for k, v in combination.items() if k != EMA})


def network_calls(model: Diffusion, sample: SampleConfig) -> int | None:
  """The rows that denoisers compute for one image: a guided step counts twice.

  Counted with networks that return zero; the gradients of guides are not counted. None for samplers
  that choose their steps, and for other models than of diffusion.
  """
  if not isinstance(model, Diffusion) or info(sample.sampler).calls is None:
    return None
  rows: list[int] = []

  def network(x, alpha, sigma, condition):
    jax.debug.callback(partial(rows.append, len(x)))
    return jnp.zeros_like(x)

  program, numbers = sample.program, sample.numbers(model.noise)
  condition = Condition(text=jnp.zeros((1, 1, 1)), image=jnp.zeros((1, 1, 1, 1)))
  other = lambda x, alpha, sigma: network(x, alpha, sigma, condition)
  others = [(other, 1.0)] * (bool(program.perturbed) + program.autoguided)
  denoise = program.guide(network, condition, condition, numbers, model.parameterization, others)
  draw = sampler(program.sampler, **dict(program.options))
  jax.block_until_ready(draw(
    denoise, jnp.ones((1, 1, 1, 1)), numbers.grid, jax.random.split(jax.random.key(0), 1)
  ))
  jax.effects_barrier()
  return sum(rows)


def best(columns: Mapping[str, Mapping[str, float]]) -> str:
  """The best column by a Fréchet distance, else CLIP score, else any metric with a direction.

  The first column where no metric has one.
  """
  first = next(iter(columns.values()))
  known = {name: found[0] for name in first if (found := value_of(name)) and found[0].better}
  order = ['{distance}', 'clip_score']
  rank = lambda name: order.index(known[name].name) if known[name].name in order else len(order)
  chosen = min(known, key=rank, default=None)
  if chosen is None:
    return next(iter(columns))
  pick = min if known[chosen].better == LOWER else max
  return pick(columns, key=lambda name: columns[name][chosen])
