"""Samplers: scans over a grid of (alpha, sigma) pairs that turn noise into data.

Each is `sampler(denoise, x, grid, keys, **options)`: `denoise(x, alpha, sigma) -> x_0` is any
denoiser; x [b ...] is noise of the grid's first sigma, or data noised to its first pair; the grid
runs from noise to data; keys [b] are one per image, which so does not depend on its batch. A
function may give the noise in place of keys. `trajectory=True` returns all states.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.samplers.common import Sampler, SamplerInfo, Trajectory
from diffusion_jax.diffusion.samplers.grid import (
  SPACINGS,
  Grid,
  padded,
  part_way,
  process_grid,
  sampling_grid,
  section,
  shifted,
  size_shift,
  spaced_levels,
)
from diffusion_jax.errors import UserError
from diffusion_jax.registry import SAMPLERS, load

__all__ = [
  'SPACINGS', 'Grid', 'Sampler', 'SamplerInfo', 'Trajectory', 'info', 'infos', 'initial_noise',
  'padded', 'part_way', 'process_grid', 'sampler', 'sampling_grid', 'section', 'shifted',
  'size_shift', 'spaced_levels',
]


def info(name: str) -> SamplerInfo:
  """Return a sampler's row of `registry.SAMPLERS`. UserError for a name that no row has."""
  return load(SAMPLERS, name, 'sampler')


def infos() -> dict[str, SamplerInfo]:
  """Return every sampler's row by name."""
  return {name: info(name) for name in SAMPLERS}


def sampler(name: str, **options) -> Sampler:
  """Return the sampler of that name, its options bound. UserError for one it does not have."""
  function = info(name).function
  known = [
    option.name for option in inspect.signature(function).parameters.values()
    if option.kind is option.KEYWORD_ONLY
  ]
  for option in options:
    if option not in known:
      raise UserError(f'sampler {name!r} has no option {option!r}; choose from {", ".join(known)}.')
  return partial(function, **options)


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]):
  """(noise [count, *shape], keys [count]) of a seed's images from `first` on."""
  return _noise(jax.random.key(seed), first, count, shape)


# One program for the cache: ten small ones, too quick to be kept in it, took a tenth of a start.
@partial(jax.jit, static_argnums=(2, 3))
def _noise(root: jax.Array, first: int, count: int, shape: tuple[int, ...]):
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(first + jnp.arange(count))
  pairs = jax.vmap(jax.random.split)(keys)
  return jax.vmap(lambda key: jax.random.normal(key, shape))(pairs[:, 0]), pairs[:, 1]
