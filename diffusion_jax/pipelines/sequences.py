"""The space of sequences: one row of places, which a transformer of pictures reads as it is."""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from diffusion_jax.errors import UserError
from diffusion_jax.limits import Range
from diffusion_jax.pipelines.spaces import Patch, Space

CANVAS = 128
"""Pixels of an edge of a drawn sequence."""
_OVER = 4
"""It is drawn so many times larger, and shrunk, which smooths its edges."""
_INK, _AXIS = ((42, 143, 208), (213, 94, 0), (0, 128, 96), (160, 60, 160)), (205, 205, 205)
REACH = 3.2
"""Deviations from the middle of a drawing to its edge."""


@dataclasses.dataclass(frozen=True)
class SequenceSpace(Space):
  """Sequences [b length channels] of about unit variance; z is [b 1 length/patch patch*channels].

  So a denoiser of pictures, such as a DiT of patch size 1, sees one row of `patch` places each, and
  the positions in it. values: numbers at a place. plane: two values are a point in the plane, which
  decides how they are drawn, no more.
  """

  name: ClassVar = 'sequences'
  field: ClassVar = 'sequence'
  numbers: ClassVar = True
  factor: ClassVar = 1
  values: Annotated[int, Range(1, 256)] = 1
  patch: Patch = 1
  plane: bool = False

  @property
  def channels(self) -> int:
    return self.values * self.patch

  def shape(self, height, width):
    """A sequence is `width` places long."""
    if height != 1 or width < 1 or width % self.patch:
      near = max(self.patch, self.patch * round(width / self.patch))
      raise UserError(
        f'the size is {height}x{width}, but the model draws sequences of multiples of '
        f'{self.patch} places; give 1x{near}.'
      )
    return 1, width // self.patch, self.channels

  def encode(self, weights, examples):
    return examples.astype(jnp.float32).reshape(len(examples), 1, -1, self.channels)

  def decode(self, weights, z, how='whole'):
    return z.astype(jnp.float32).reshape(len(z), -1, self.values)

  def drawn(self, examples):
    return np.stack([draw(np.asarray(example), self.plane) for example in examples])


def draw(values: np.ndarray, plane: bool = False) -> UInt8[np.ndarray, 'h w 3']:
  """Draw a sequence [length channels]: its points in the plane, joined up, or lines over time."""
  size = CANVAS * _OVER
  image = Image.new('RGB', (size, size), 'white')
  pen = ImageDraw.Draw(image)
  at = lambda y: size / 2 * (1 - np.clip(y / REACH, -1, 1))
  if plane:
    points = np.stack([size - at(values[:, 0]), at(values[:, 1])], axis=-1)
    lines = [np.concatenate([points, points[:1]])]
  else:
    pen.line([(0, size / 2), (size, size / 2)], _AXIS, _OVER)
    time = np.linspace(0, size - 1, len(values))
    lines = [np.stack([time, at(channel)], axis=-1) for channel in values.T]
  for number, line in enumerate(lines):
    pen.line([tuple(point) for point in line], _INK[number % len(_INK)], 2 * _OVER, 'curve')
  return np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BOX))
