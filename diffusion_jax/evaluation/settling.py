"""Whether samples settle as steps grow: the same noise, drawn by more and more steps.

A deterministic sampler solves one ODE, so that its samples tend to those of the exact solution. An
ancestral one adds noise at each step: more steps are other noise, and other pictures of the same
distribution (Ho, Jain & Abbeel 2020; Song, Meng & Ermon 2021, section 5.2).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pipelines.sampling import SampleConfig
from diffusion_jax.types import Weights

Drawn = dict[str, dict[int, np.ndarray]]
"""Sampler -> steps -> images, float32 [n h w 3] in [-1, 1]."""


def drawn_by(
  model: Diffusion, weights: Weights, prompts: Sequence[str], config: SampleConfig,
  samplers: Iterable[str], counts: Sequence[int], **how: Any,
) -> Drawn:
  """Return the same prompts and noise by each sampler in each number of steps, fewest first.

  how: other arguments of `Diffusion.sample`, with the seed.
  """
  found: Drawn = {}
  for name in samplers:
    own = {} if name == config.sampler else {'options': {}, 'eta': None}
    settings = dataclasses.replace(config, sampler=name, **own)
    model.check_sampling(settings)
    draw = lambda steps, settings=settings: model.sample(
      weights, prompts, dataclasses.replace(settings, steps=steps), **how
    )
    found[name] = {steps: np.concatenate(list(draw(steps))) for steps in sorted(set(counts))}
  return found


def changes(drawn: Mapping[int, np.ndarray]) -> dict[int, float]:
  """Return steps -> root mean square difference from the images of the next larger number."""
  counts = sorted(drawn)
  distance = lambda a, b: float(np.sqrt(np.mean((drawn[a] - drawn[b]) ** 2)))
  return {few: distance(few, more) for few, more in itertools.pairwise(counts)}
