"""Rules by which each tool scales images before its network, which change FID.

Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation". Every rule is
linear along each axis: two matrices, made once for a size in the tool's own precision and applied
as products on the device, for any size.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.errors import require

Matrix = Float[np.ndarray, 'out in']
_BITS = 22
"""Behind the point, in Pillow's weights."""


def _two_taps(source: np.ndarray, size: int) -> Matrix:
  """Linear interpolation at positions `source`, in pixels; past the end the last pixel counts."""
  low = np.minimum(np.floor(source), size - 1).astype(np.int64)
  weight = (source - low.astype(source.dtype)).astype(np.float64)
  rows = np.arange(len(source))
  matrix = np.zeros((len(source), size))
  np.add.at(matrix, (rows, low), 1 - weight)
  np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), weight)
  return matrix


def tensorflow(size: int, out: int) -> Matrix:
  """Bilinear of TensorFlow 1: pixel i of the result is at i * size / out, without halves."""
  return _two_taps(np.arange(out, dtype=np.float32) * np.float32(size / out), size)


def pytorch(size: int, out: int) -> Matrix:
  """torch.nn.functional.interpolate, bilinear: centres of pixels at halves, no antialiasing."""
  source = (np.arange(out) + 0.5) * np.float32(size / out).astype(np.float64) - 0.5
  return _two_taps(np.maximum(source, 0).astype(np.float32), size)  # Rounded once, as fused there.


def clean(size: int, out: int) -> Matrix:
  """PIL's bicubic (a = -1/2) with antialiasing: the window grows with the factor of reduction."""
  scale = size / out
  stretch = max(scale, 1.0)
  matrix = np.zeros((out, size))
  for row, centre in enumerate((np.arange(out) + 0.5) * scale):
    low = max(int(centre - 2 * stretch + 0.5), 0)
    high = min(int(centre + 2 * stretch + 0.5), size)
    weights = _bicubic((np.arange(low, high) + 0.5 - centre) / stretch)
    matrix[row, low:high] = weights / weights.sum()
  return matrix


def pillow(size: int, out: int) -> Matrix:
  """The rule `clean` in the fixed point that Pillow has for uint8: multiples of 2**-22."""
  matrix = clean(size, out) * 2**_BITS
  return np.trunc(matrix + np.copysign(0.5, matrix)) / 2**_BITS


def _bicubic(x: np.ndarray) -> np.ndarray:
  """Keys 1981, eq. 15, with a = -1/2."""
  x = np.abs(x)
  near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@dataclasses.dataclass(frozen=True)
class Rule:
  """matrix: (size, new size) -> [new old]. clip: whether results are clipped to 0-255.

  normalize: float 0-255 -> Inception's input, about [-1, 1], as the tool computes it; None where no
  tool has one. whole: whether widths come first and each axis rounds to 0-255.
  """

  matrix: Callable[[int, int], Matrix]
  normalize: Callable[[jax.Array], jax.Array] | None = None
  clip: bool = False
  whole: bool = False

  @property
  def axes(self) -> tuple[int, int]:
    return (2, 1) if self.whole else (1, 2)


_signed = lambda x: (x - 128) / 128

RULES = {
  'tensorflow': Rule(tensorflow, _signed),
  'pytorch': Rule(pytorch, lambda x: 2 * (x / 255) - 1),
  'clean': Rule(clean, _signed, clip=True),
  'pillow': Rule(pillow, whole=True),
}
"""torch-fidelity's and guided-diffusion's; pytorch-fid's; clean-fid's; that of Pillow, and so of
torchvision, for pictures of uint8, bit for bit. There widths come first, as in every Pillow before
13, by which values were published; later ones begin with heights that shrink more than widths."""
OF_INCEPTION = tuple(name for name, rule in RULES.items() if rule.normalize)


def rule(name: str) -> Rule:
  """Return a rule by name. UserError, naming them all, for another name."""
  require(name in RULES, f'There is no resize rule {name!r}; choose of {", ".join(RULES)}.')
  return RULES[name]


def resize(
  images: UInt8[Array, 'b h w c'] | Float[Array, 'b h w c'], size: int | tuple[int, int], name: str
) -> Float[Array, 'b H W c']:
  """Return images of values 0-255 as float32 0-255 of another size, (H, W) or both at once."""
  chosen, new = rule(name), (size, size) if isinstance(size, int) else size
  x = jnp.asarray(images, jnp.float32)
  for axis in chosen.axes:
    matrix = _matrix(chosen.matrix, x.shape[axis], new[axis - 1])
    if matrix is not None:
      x = _whole(x, matrix, axis) if chosen.whole else _product(x, matrix, axis)
  return jnp.clip(x, 0, 255) if chosen.clip else x


def _product(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  if axis == 2:
    return jnp.einsum('Ww,bhwc->bhWc', matrix, x, precision='highest')
  b, _, w, c = x.shape
  return jnp.matmul(matrix, x.reshape(b, -1, w * c), precision='highest').reshape(b, -1, w, c)


def _whole(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  """The product, rounded to whole numbers of 0-255, halves up, exactly.

  22-bit weights are split in two of 11, so that float32 holds every sum.
  """
  high = np.round(matrix * 2**11) / np.float32(2**11)
  y, rest = _product(x, high, axis), _product(x, matrix - high, axis)
  floor = jnp.floor(y)
  return jnp.clip(floor + jnp.floor(y - floor + rest + 0.5), 0, 255)


def resize_on_host(
  image: UInt8[np.ndarray, 'h w c'], size: int | tuple[int, int], name: str
) -> Float[np.ndarray, 'H W c']:
  """Return `resize` of one image without the device: for sets in which every size is another."""
  chosen, new = rule(name), (size, size) if isinstance(size, int) else size
  x = image.astype(np.float64 if chosen.whole else np.float32)
  for axis in chosen.axes:
    matrix = _matrix(chosen.matrix, x.shape[axis - 1], new[axis - 1])
    if matrix is not None:
      x = np.tensordot(matrix, x, 1) if axis == 1 else np.einsum(
        'Ww,hwc->hWc', matrix, x, optimize=True
      )
      x = np.clip(np.floor(x + 0.5), 0, 255) if chosen.whole else x
  return np.clip(x, 0, 255) if chosen.clip else x.astype(np.float32)


def prepare(images: UInt8[Array, 'b h w c'], size: int, name: str) -> Float[Array, 'b s s c']:
  """Return what an Inception of images of `size` sees, by a rule of OF_INCEPTION."""
  return rule(name).normalize(resize(images, size, name))


@functools.lru_cache(maxsize=64)
def _matrix(make: Callable[[int, int], Matrix], size: int, out: int) -> np.ndarray | None:
  """float32; None where nothing changes."""
  return None if size == out else make(size, out).astype(np.float32)
