"""Samplers by name: the rows of `registry.SAMPLERS`, each imported when it is asked for."""

import inspect

from diffusion_jax.diffusion.samplers.common import Sampler, SamplerInfo, as_arrays
from diffusion_jax.errors import UserError
from diffusion_jax.registry import SAMPLERS, load


def info(name: str) -> SamplerInfo:
  """Return what is known of a sampler. UserError for a name that no row has."""
  return load(SAMPLERS, name, 'sampler')


def infos() -> dict[str, SamplerInfo]:
  """Return every sampler's row by name."""
  return {name: info(name) for name in SAMPLERS}


def sampler(name: str, **options) -> Sampler:
  """Return the sampler of that name, with its options bound.

  Raises:
    UserError: for a name that no row has, or an option that the sampler does not have.
  """
  function = info(name).function
  known = [
    option.name for option in inspect.signature(function).parameters.values()
    if option.kind is option.KEYWORD_ONLY
  ]
  for option in options:
    if option not in known:
      raise UserError(f'sampler {name!r} has no option {option!r}; choose from {", ".join(known)}.')
  return lambda denoise, x, grid, keys, **more: function(
    denoise, *as_arrays(x, grid), keys, **options, **more
  )
