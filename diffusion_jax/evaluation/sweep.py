"""Sweeps: every combination of several values of what decides how pictures are drawn."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.samplers import SAMPLERS, sampler
from diffusion_jax.errors import UserError
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.types import Condition

EMA = 'ema_halflife_images'
KINDS: dict[str, type] = {
  'guidance': float, 'steps': int, 'sampler': str, 'spacing': str, 'guidance_rescale': float,
  'image_guidance': float, 'clip_skip': int, EMA: float,
}
"""What may be swept: fields of `SampleConfig`, and the average's length."""

Combination = dict[str, Any]


def combinations(texts: Sequence[str]) -> list[Combination]:
  """'NAME=A,B' each -> every combination of one value of each; the last name varies fastest.

  Raises:
    UserError: a text is not of that form, a name is unknown or given twice, a value is none.
  """
  swept: dict[str, list[Any]] = {}
  for text in texts:
    name, equals, values = text.partition('=')
    if not equals or name not in KINDS:
      raise UserError(
        f'--sweep {text} is not of the form NAME=A,B with a NAME of {", ".join(KINDS)}.'
      )
    if name in swept:
      raise UserError(f'--sweep names {name} twice; give all of its values at once.')
    try:
      swept[name] = [KINDS[name](value) for value in values.split(',')]
    except ValueError:
      raise UserError(
        f'--sweep {text}: {name} takes values like {KINDS[name](4)}, split by commas.'
      ) from None
    if len(set(swept[name])) < len(swept[name]):
      raise UserError(f'--sweep {text} has a value twice; name each once.')
  return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def applied(sample: SampleConfig, combination: Mapping[str, Any]) -> SampleConfig:
  """The settings with those of a combination."""
  return dataclasses.replace(sample, **{k: v for k, v in combination.items() if k != EMA})


def network_calls(model: Diffusion, sample: SampleConfig) -> int | None:
  """Rows that the U-Net computes for one picture: a guided step counts twice for each call.

  They are counted while the sampler runs, with a network that always says zero. None for samplers
  that choose their steps by what the network says.
  """
  if SAMPLERS[sample.sampler].calls is None:
    return None
  rows: list[int] = []

  def network(x, alpha, sigma, condition):
    jax.debug.callback(partial(rows.append, len(x)))
    return jnp.zeros_like(x)

  program, numbers = sample.program, sample.numbers(model.noise)
  told = Condition(text=jnp.zeros((1, 1, 1)), image=jnp.zeros((1, 1, 1, 1)))
  denoise = program.guide(network, told, told, numbers, model.parameterization)
  draw = sampler(program.sampler, **dict(program.options))
  jax.block_until_ready(draw(
    denoise, jnp.ones((1, 1, 1, 1)), numbers.grid, jax.random.split(jax.random.key(0), 1)
  ))
  jax.effects_barrier()
  return sum(rows)


def best(figures: Mapping[str, Mapping[str, float]]) -> str:
  """The column with the lowest Fréchet distance, else the highest CLIP score, else the first."""
  first = next(iter(figures.values()))
  distance = next((name for name in first if name == 'fid' or name.startswith('fd_')), None)
  if distance:
    return min(figures, key=lambda name: figures[name][distance])
  return max(figures, key=lambda name: figures[name].get('clip_score', 0.0))
