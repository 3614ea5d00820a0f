"""The seeds that people choose."""

import operator

from diffusion_jax.errors import UserError

MOST = 2**32 - 1
"""The largest: JAX would cut a longer one to 32 bits and draw what another seed draws."""


def check_seed(seed: int, name: str = 'seed') -> int:
  """The seed. UserError, calling it `name`, unless it is a whole number from 0 to MOST."""
  try:
    number = operator.index(seed)
  except TypeError:
    number = -1
  if not 0 <= number <= MOST:
    shown = f'{seed!r:.40}' if not isinstance(seed, int) or abs(seed) < 10**20 else (
      f'a number of {seed.bit_length()} bits'
    )
    raise UserError(f'{name} is {shown}; give a whole number from 0 to {MOST}.')
  return number
