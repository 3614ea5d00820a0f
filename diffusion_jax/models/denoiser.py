"""The base of denoiser networks, called as network(x, t, condition).

Its config has in_channels, out_channels: of x, with `condition.image` joined to it, and of the
result; factor: of which height and width of x are multiples; most: the largest of them, None or
absent for any; conditions: the fields of a Condition that it reads, each with its shape after the
examples; and, where its sample_size changes nothing that is computed, trained_at(height, width):
the config with that of x in training. A Parameterization, not the network, says what its output
means.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import require
from diffusion_jax.models.config import check_size
from diffusion_jax.models.network import Blocks
from diffusion_jax.types import Condition

Shapes = dict[str, tuple[int | None, ...]]
"""Shapes by name; None for any length."""

CHECKED = ('text', 'pooled', 'sizes', 'labels', 'guidance')
"""Fields of a Condition that must be there for networks that read them, and for no other."""


class Denoiser(Blocks):
  """A network (x [b h w c], t [b], condition) -> [b h w o]."""

  config: Any

  def join(self, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    """x with the channels of `condition.image`.

    UserError: a size that cannot be halved or cut into patches, or is too large, another shape than
    the config's, or a condition that is missing or unknown.
    """
    if condition.image is not None:
      x = jnp.concatenate([x, condition.image.astype(x.dtype)], axis=-1)
    most = getattr(self.config, 'most', None)
    check_size(x.shape, self.config.in_channels, self.config.factor, 'The input', most)
    b = len(x)
    require(t.shape == (b,), f'The times must have shape [{b}], not {list(t.shape)}.')
    self.check_conditions(b, condition)
    return x

  def check_conditions(self, b: int, condition: Condition) -> None:
    """Raise UserError unless the condition has what the config asks for, in its shapes."""
    who, read = type(self).__name__, self.config.conditions
    for name in CHECKED:
      value = getattr(condition, name)
      if name not in read:
        require(value is None, f'This {who} takes no `{name}`, by its config; leave it out.')
        continue
      require(value is not None, f'This {who} needs `{name}`, by its config; pass it.')
      wanted = (b, *read[name])
      fits = len(wanted) == value.ndim and all(
        length in (None, found) for length, found in zip(wanted, value.shape, strict=True)
      )
      words = ' '.join('n' if length is None else str(length) for length in wanted)
      require(fits, f'`{name}` must have shape [{words}], not {list(value.shape)}.')
    if (mask := condition.mask) is not None:
      wanted = None if condition.text is None else condition.text.shape[:2]
      require(
        mask.shape == wanted, f'`mask` is {list(mask.shape)}; it must have an entry for each token '
        f'of the text, {list(wanted or ())}.',
      )
