"""Random masks for training an inpainting model."""

import jax
import jax.numpy as jnp

WHOLE = 0.25
"""Share of masks that cover everything, with which Stable Diffusion's inpainting was trained."""


def random_masks(key: jax.Array, shape: tuple[int, int, int], count: int = 4) -> jax.Array:
  """Unions of up to `count` random rectangles, bool [b h w], true where to paint; pure.

  A rectangle has edges of 1/8 to 5/8 of the picture's; WHOLE of the masks are true everywhere.
  """
  b, h, w = shape
  keys = jax.random.split(key, 4)
  size = jax.random.uniform(keys[0], (2, b, count), minval=1 / 8, maxval=5 / 8)
  start = jax.random.uniform(keys[1], (2, b, count)) * (1 - size)
  used = jnp.arange(count) < jax.random.randint(keys[2], (b, 1), 1, count + 1)

  def inside(axis: int, edge: int) -> jax.Array:
    place = (jnp.arange(edge) + 0.5) / edge
    low, high = start[axis][..., None], (start + size)[axis][..., None]
    return (place >= low) & (place < high)

  rectangles = inside(0, h)[..., :, None] & inside(1, w)[..., None, :]
  some = (rectangles & used[..., None, None]).any(axis=1)
  return some | jax.random.bernoulli(keys[3], WHOLE, (b, 1, 1))
