"""What is kept of pictures: masks and averages, as sampling holds them and as they are put back."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from diffusion_jax.diffusion.projection import Projection, known_averages, known_places
from diffusion_jax.errors import UserError, require
from diffusion_jax.limits import MOST_EDGE
from diffusion_jax.pipelines.spaces import Space, fold, unfold
from diffusion_jax.types import Images, Latents

PAINTED = 'painted'
"""The row with `painted_shares`."""

Margins = tuple[int, int, int, int]
"""Pixels to the left, above, to the right and below."""


def painted_shares(
  masks: Bool[np.ndarray, 'n h w'], feather: int = 0
) -> Float[np.ndarray, 'n h w']:
  """Return how much of each pixel is painted: 0 without a mask, and within it up to 1.

  feather: pixels over which it grows from the mask's edge on; with 0 all of the mask is 1.
  """
  if not feather:
    return masks.astype(np.float32)
  from scipy.ndimage import distance_transform_edt  # Takes long to import.

  distances = np.stack([
    distance_transform_edt(mask) if not mask.all() else np.full(mask.shape, np.inf)
    for mask in masks
  ])
  return np.clip(distances / (feather + 1), 0, 1).astype(np.float32)


def pasted(images: Images, pictures: Images, shares: jax.Array) -> Images:
  """Put what is painted into pictures, both [b h w 3], by shares [b h w]; at 0 it is the picture.
  """
  shares = shares[..., None]
  mixed = shares * images + (1 - shares) * pictures
  return jnp.where(shares == 0, pictures, mixed)


def free_places(space: Space, painted: jax.Array) -> jax.Array:
  """Masks [b H W] of pixels -> [b h w c] of z: places of which any pixel is painted."""
  side = space.factor // space.patch
  b, height, width = painted.shape
  places = painted.reshape(b, height // side, side, width // side, side).any(axis=(2, 4))
  each = space.channels // space.patch**2
  return fold(jnp.broadcast_to(places[..., None], (*places.shape, each)), space.patch)


def projection(
  space: Space, z: Latents, free: jax.Array | None = None, low_pass: int = 0
) -> Projection:
  """Return how sampling holds pictures z [b ...]: where not `free`, see `free_places`, or in
  averages over squares of `low_pass` pixels."""
  if not low_pass:
    return known_places(z, free)
  # Of pixels, or of the autoencoder's own places, which stand in z's channels.
  averages = known_averages(unfold(z, space.patch), low_pass * space.patch // space.factor)
  return lambda x0: fold(averages(unfold(x0, space.patch)), space.patch)


def check_low_pass(space: Space, low_pass: int, height: int, width: int) -> None:
  """Raise UserError unless squares of so many pixels tile images, and are whole places of z."""
  side = space.factor // space.patch
  require(
    low_pass > 0 and low_pass % side == 0 and height % low_pass == 0 and width % low_pass == 0,
    f'low_pass (--enlarge) is {low_pass}; give a multiple of {side} that divides the '
    f'{height}x{width} pixels of the picture.',
  )


def outpainted(
  images: UInt8[np.ndarray, 'n h w 3'], margins: Margins,
  masks: Bool[np.ndarray, 'n h w'] | None = None,
) -> Mapping[str, np.ndarray]:
  """Return `images` and `masks` of `Inputs` with margins to paint around pictures.

  masks: where else to paint. In the margins the nearest pixel is repeated, from which sampling
  starts if not all of its steps are taken.
  """
  left, top, right, bottom = margins
  sides = ((0, 0), (top, bottom), (left, right))
  if masks is None:
    masks = np.zeros(images.shape[:3], bool)
  return {
    'images': np.pad(images, (*sides, (0, 0)), mode='edge'),
    'masks': np.pad(masks, sides, constant_values=True),
  }


def parse_margins(text: str, name: str = '--outpaint') -> Margins:
  """Return (left, top, right, bottom) of '16,0,16,0'. UserError, calling it `name`, else."""
  parts = [part.strip() for part in text.split(',')]
  if len(parts) != 4 or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
    raise UserError(
      f'{name} is {text[:40]!r}; give LEFT,TOP,RIGHT,BOTTOM in pixels, such as 16,0,16,0.'
    )
  margins = tuple(map(int, parts))
  require(
    0 < sum(margins) and max(margins) <= MOST_EDGE,
    f'{name} is {text[:40]!r}; give margins up to {MOST_EDGE} pixels, one of them above 0.',
  )
  return margins


def enlarged(images: UInt8[np.ndarray, 'n h w 3'], times: int) -> UInt8[np.ndarray, 'n H W 3']:
  """Repeat each pixel `times` times both ways: `images` of `Inputs` with that for low_pass."""
  return images.repeat(times, axis=1).repeat(times, axis=2)
