"""Pictures back to the noise that gives them, and strips of pictures between two, by any model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.backend import xla
from diffusion_jax.diffusion import inversion
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.mesh import in_batches
from diffusion_jax.pipelines.distilled import predicts_mean_velocity
from diffusion_jax.pipelines.guides import scores_of
from diffusion_jax.pipelines.sampling import Numbers, Program, SampleConfig
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Latents, Weights

if TYPE_CHECKING:
  from diffusion_jax.pipelines.model import Diffusion

ITERATIONS = 3
"""Network calls a step, if nothing is said."""
SAMPLER = 'ddim'
IMAGES = 'inverted'
"""Column of the pictures."""


def invert(
  model: Diffusion, weights: Weights, images: np.ndarray, prompts: Sequence[str],
  config: SampleConfig, *, mesh: Mesh, negative: str = '', iterations: int = ITERATIONS,
  batch_size: int = 16,
) -> np.ndarray:
  """Return the noise, float32 [n ...] of z's shape, from which `sample` draws the images again.

  As `Diffusion.sample(..., noise=...)` with the same prompts and settings, of DDIM without noise;
  see `diffusion.inversion.invert` for `iterations` and the error. images: uint8 [n H W 3].
  UserError: settings of another sampler, of one step, or that do not fit the model.
  """
  check(config)
  if predicts_mean_velocity(model.denoiser.config):
    raise UserError('the denoiser is told of whole steps, which cannot be undone; use another.')
  model.check_sampling(config, negative)
  _, height, width, _ = images.shape
  rows = model.rows(
    prompts, negative, height=height, width=width, guidance=config.distilled_guidance,
    syntax=config.prompt_syntax, sizing=config.sizing,
  )
  if all(c.same(rows) for c in model.conditioners.values()):
    config = dataclasses.replace(config, guidance=1.0)
  numbers = config.numbers(model.noise, tokens=model.tokens(height, width))
  inversion.check_steps(numbers.grid)
  rows[IMAGES] = images
  run = lambda weights, *columns: _inverted(
    model, weights, dict(zip(rows, columns, strict=True)), config.program, numbers, iterations
  )
  parts = in_batches(run, weights, *rows.values(), mesh=mesh, batch_size=batch_size)
  return np.concatenate(list(parts))


def check(config: SampleConfig) -> None:
  """Raise UserError for settings that draw by another way than the one that is undone."""
  if config.sampler != SAMPLER or config.own_options.get('eta'):
    raise UserError(
      f'pictures are inverted along the steps of {SAMPLER} without noise; set the sampler to '
      f'{SAMPLER}, not {config.sampler}, and leave out its eta.'
    )
  if dict(config.program.options).get('keep_epsilon'):
    raise UserError(
      'steps that take epsilon and x_0 from two estimates, as with CFG++, are not undone; choose '
      'another kind of guidance.'
    )


@functools.partial(xla.jit, static_argnums=(0, 3, 5))
def _inverted(
  model: Diffusion, weights: Weights, rows: Mapping[str, jax.Array], program: Program,
  numbers: Numbers, iterations: int,
) -> Latents:
  condition, negative = model.conditions(weights, rows, program.clip_skip)
  scores = scores_of(model.conditioners, program.guides, weights, rows, model.space)
  guided = model.guided(weights, condition, negative, program, numbers, scores=scores)
  z = model.space.encode(weights, to_float(rows[IMAGES]))
  return inversion.invert(guided, z, numbers.grid, iterations) / numbers.start


def strip(
  model: Diffusion, weights: Weights, noise: np.ndarray, prompts: Sequence[str], frames: int,
  config: SampleConfig, **how: Any,
) -> Iterator[np.ndarray]:
  """Yield images, as `Diffusion.sample`, on the way between two.

  noise: float32 [2 ...], that of the ends, between which frames lie on great circles. prompts: of
  both ends. `how`: the other arguments of `sample`. By a sampler that adds no noise the ends are
  what that draws from their noise.
  """
  if frames < 2 or len(prompts) != 2:
    raise UserError(f'a way has two ends and frames from 2 on, not {len(prompts)} and {frames}.')
  fractions = np.linspace(0, 1, frames, dtype=np.float32)
  between = np.asarray(inversion.arc(noise, frames))
  start, end = ([prompt] * frames for prompt in prompts)
  yield from model.sample(
    weights, start, config, noise=between, toward=(end, fractions), **how
  )
