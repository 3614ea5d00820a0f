"""How each tool scales images before its network: rules that change FID.

Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation". Every rule
is linear along each axis, so it is two matrices, made once for a size and applied as products: any
size, square or not, and nothing leaves the device. The numbers of a matrix are computed in the
precision in which its tool computes them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion_jax.models.checks import require

Matrix = Float[np.ndarray, 'out in']


def _two_taps(source: np.ndarray, size: int) -> Matrix:
  """Linear interpolation at positions `source`, in pixels; past the end the last pixel counts."""
  low = np.minimum(np.floor(source), size - 1).astype(np.int64)
  share = (source - low.astype(source.dtype)).astype(np.float64)
  rows = np.arange(len(source))
  matrix = np.zeros((len(source), size))
  np.add.at(matrix, (rows, low), 1 - share)
  np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), share)
  return matrix


def tensorflow(size: int, out: int) -> Matrix:
  """Bilinear of TensorFlow 1: pixel i of the result lies at i * size / out, without halves."""
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


def _bicubic(x: np.ndarray) -> np.ndarray:
  """Keys 1981, eq. 15, with a = -1/2."""
  x = np.abs(x)
  near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@dataclasses.dataclass(frozen=True)
class Rule:
  """matrix: (size, new size) -> [new old]. clip: whether results are cut to 0-255.

  normalize: float 0-255 -> what the network sees, about [-1, 1], as the rule's tool computes it.
  """

  matrix: Callable[[int, int], Matrix]
  normalize: Callable[[jax.Array], jax.Array]
  clip: bool = False


_signed = lambda x: (x - 128) / 128

RULES = {
  'tensorflow': Rule(tensorflow, _signed),
  'pytorch': Rule(pytorch, lambda x: 2 * (x / 255) - 1),
  'clean': Rule(clean, _signed, clip=True),
}
"""torch-fidelity's and guided-diffusion's; pytorch-fid's; clean-fid's."""


def rule(name: str) -> Rule:
  """A rule by name. UserError, naming them all, for another name."""
  require(name in RULES, f'There is no resize rule {name!r}; choose of {", ".join(RULES)}.')
  return RULES[name]


def resize(
  images: UInt8[Array, 'b h w c'] | Float[Array, 'b h w c'], size: int | tuple[int, int], name: str
) -> Float[Array, 'b H W c']:
  """Images of values 0-255 -> float32 0-255 of another size, by the rule of that name.

  Args:
    size: (H, W), or both at once.
  """
  height, width = (size, size) if isinstance(size, int) else size
  chosen = rule(name)
  rows = _matrix(chosen.matrix, images.shape[1], height)
  columns = _matrix(chosen.matrix, images.shape[2], width)
  x = jnp.asarray(images, jnp.float32)
  if rows is not None:
    b, _, w, c = x.shape
    x = jnp.matmul(rows, x.reshape(b, -1, w * c), precision='highest').reshape(b, height, w, c)
  if columns is not None:
    x = jnp.einsum('Ww,bhwc->bhWc', columns, x, precision='highest')
  return jnp.clip(x, 0, 255) if chosen.clip else x


def resize_on_host(
  image: UInt8[np.ndarray, 'h w c'], size: int | tuple[int, int], name: str
) -> Float[np.ndarray, 'H W c']:
  """As `resize`, of one image and without the device: for sets in which every size is another."""
  height, width = (size, size) if isinstance(size, int) else size
  chosen = rule(name)
  rows = _matrix(chosen.matrix, image.shape[0], height)
  columns = _matrix(chosen.matrix, image.shape[1], width)
  x = image.astype(np.float32)
  x = x if rows is None else np.tensordot(rows, x, 1)
  x = x if columns is None else np.einsum('Ww,hwc->hWc', columns, x, optimize=True)
  return np.clip(x, 0, 255) if chosen.clip else x


def prepare(images: UInt8[Array, 'b h w c'], size: int, name: str) -> Float[Array, 'b s s c']:
  """uint8 images of any size -> what a network of images of `size` sees, by the rule of a name."""
  return rule(name).normalize(resize(images, size, name))


@functools.lru_cache(maxsize=64)
def _matrix(make: Callable[[int, int], Matrix], size: int, out: int) -> np.ndarray | None:
  """float32; None where nothing changes."""
  return None if size == out else make(size, out).astype(np.float32)
