"""Bits per dimension of test images under a model on pixels: the bound's three terms, and the ODE.

Pixels are whole numbers from 0 to 255. The bound gives each the mass of a Gaussian in its bin
(Ho, Jain & Abbeel 2020, eq. 13), as a model of the T steps of its table, or of so many of its
process, with the variance that it has learned, or the posterior's. The probability-flow ODE has a
density, of pixels dequantized by uniform noise (Song et al. 2021, appendix D.2): a bound in
expectation, and otherwise exact up to the solver and the estimate of the trace.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.backend.xla import jit
from diffusion_jax.diffusion.bound_by_step import bound_by_step
from diffusion_jax.diffusion.likelihood import flow_likelihood
from diffusion_jax.diffusion.samplers.common import unit_noise
from diffusion_jax.evaluation.evaluator import Value, named, seed_of
from diffusion_jax.evaluation.generated import fresh_weights
from diffusion_jax.evaluation.images import shuffled
from diffusion_jax.evaluation.likelihood import Likelihood, check_count, image_keys, over_images
from diffusion_jax.limits import check_seed
from diffusion_jax.pipelines.model import Diffusion
from diffusion_jax.pixels import to_float
from diffusion_jax.types import Weights

TERMS = ('bound', 'prior', 'steps', 'decoder', 'flow')
BIN = np.log2(127.5)
"""Bits by which a pixel in [-1, 1] has more density than mass of its bin, 2 / 255 wide."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PixelLikelihood(Likelihood):
  """Mean bits per dimension of the first `images` test images, in the order of `shuffled`.

  bits_per_dim_bound and its terms prior, steps and decoder, and bits_per_dim_flow, with standard
  errors over images; 'bound_by_step' has the steps' divergences. Baseline: 'untrained', a fresh
  denoiser. `run` raises a UserError for fewer than 2 images, or more than there are.
  """

  name = 'pixel_likelihood'

  @property
  def metrics(self) -> list[str]:
    bits = [f'bits_per_dim_{name}' for name in TERMS]
    return [name for one in bits for name in (one, f'{one}_stderr')]

  def run(self, model: Diffusion, params: Weights, key: jax.Array) -> Iterator[tuple[str, Value]]:
    check_count(self.images, len(self.test))
    seed = check_seed(seed_of(key))
    key_noise, key_offset = jax.random.split(jax.random.key(seed))
    records = shuffled(self.test, self.images)
    images = np.stack([record['image'] for record in records])
    rows = model.rows(
      [model.prompt(record) for record in records], height=images.shape[1], width=images.shape[2]
    )
    score = self.once(f'score {seed}', lambda: make_pixel_scorer(
      model, tuple(rows), self, jax.random.uniform(key_offset)
    ))
    bits = lambda label, weights: over_images(
      score, weights, images, image_keys(key_noise, len(records)), *rows.values(), mesh=self.mesh,
      batch_size=min(self.batch_size, len(records)), label=label,
    )
    found = {'model': bits('model', params)}
    yield from _means(found['model']).items()
    if self.baselines:
      found['untrained'] = bits('untrained', fresh_weights(model, params, self.mesh))
      yield from named({'untrained': _means(found['untrained'])})
    yield 'bound_by_step', {
      'timesteps': found['model']['timesteps'][0].tolist(),
      'weights': found['model']['weights'][0].tolist(),
      **{name: part['by_step'].mean(axis=0).tolist() for name, part in found.items()},
    }
    yield 'settings', {
      'samples': len(records), 'seed': seed, 'timesteps': len(model.noise.levels()[0]),
      'variance': variance_of(model), **self.settings,
    }


def variance_of(model: Diffusion) -> str:
  """Return which variance of `bound_by_step` a model's steps have."""
  return 'learned' if model.learned_variance else 'fixed_small'


def make_pixel_scorer(
  model: Diffusion, names: tuple[str, ...], config: Likelihood, offset: jax.Array
) -> Callable:
  """The function (weights, uint8 images [b h w 3], key data [b k], columns) -> arrays [b ...].

  TERMS, in bits per dimension; 'by_step' [b n], and of these steps 'timesteps' and 'weights'.
  columns: those of `Diffusion.rows` with these names.
  """
  variance = variance_of(model)

  @jit
  def score(weights: Weights, images, keys, *columns):
    condition = model.condition(weights, dict(zip(names, columns, strict=True)))
    given = lambda **how: lambda x, a, s: model.denoise(weights, **how)(x, a, s, condition)
    keys = jax.random.wrap_key_data(keys)
    x0 = model.space.encode(weights, to_float(images))
    terms = bound_by_step(
      given(variance=variance == 'learned'), x0, *model.noise.levels(), keys, draws=config.draws,
      offset=offset, variance=variance,
    )
    shift = unit_noise(keys, 2**30, x0, jax.random.uniform) - 0.5
    flow = flow_likelihood(
      given(), x0 + shift * (2 / 255), model.noise.smooth_process, keys, trace=config.trace,
      probes=config.probes, solver=config.solver, steps=config.ode_steps, t_min=0.0,
    )
    spread = lambda part: jnp.broadcast_to(part, (len(x0), *part.shape))
    return {
      'bound': terms.total, 'prior': terms.prior, 'steps': terms.diffusion,
      'decoder': terms.decoder, 'flow': flow.bits + BIN, 'by_step': terms.steps.T,
      'timesteps': spread(terms.timesteps), 'weights': spread(terms.weights),
    }

  return score


def _means(found: dict[str, np.ndarray]) -> dict[str, float]:
  """Return means of the terms, and their standard errors."""
  rows = {}
  for name in TERMS:
    value = np.asarray(found[name], np.float64)
    rows[f'bits_per_dim_{name}'] = float(value.mean())
    rows[f'bits_per_dim_{name}_stderr'] = float(value.std(ddof=1) / len(value) ** 0.5)
  return rows
