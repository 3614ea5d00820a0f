"""LPIPS (Zhang et al. 2018, eq. 1) with VGG16 (Simonyan & Zisserman 2015), as a pure function.

There is nothing to train, so it is no module: `lpips(params, a, b)`, with parameters by the names
of the `lpips` package's state dictionary (net.slice1.0, lin0.model.1, ...).
"""

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax.models.checks import require
from diffusion_jax.types import Images, Params, PerExample

# Convolutions by their number in VGG16's feature stack, and channels, per slice. Each slice but the
# first starts with a 2x2 maximum.
SLICES = (
  ((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From [-1, 1] to the channel statistics of ImageNet."""


def lpips_shapes() -> dict[str, jax.ShapeDtypeStruct]:
  """Shape of every parameter by dotted name."""
  shapes, i = {}, 3
  for n, (layers, o) in enumerate(SLICES):
    for layer in layers:
      shapes[f'net.slice{n + 1}.{layer}.kernel'] = (3, 3, i, o)
      shapes[f'net.slice{n + 1}.{layer}.bias'] = (o,)
      i = o
    shapes[f'lin{n}.model.1.kernel'] = (1, 1, o, 1)
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def lpips(params: Params, a: Images, b: Images) -> PerExample:
  """Perceptual distance of images a and b [b h w 3] in [-1, 1], at least 16x16 -> [b], >= 0."""
  require(
    a.shape == b.shape and a.ndim == 4 and a.shape[-1] == 3 and min(a.shape[1:3]) >= 16,
    f'LPIPS compares two equal shapes [b h w 3] of at least 16x16, not {a.shape} and {b.shape}.',
  )
  x = (jnp.concatenate([a, b]) - jnp.asarray(SHIFT, a.dtype)) / jnp.asarray(SCALE, a.dtype)
  total = jnp.zeros(a.shape[0], jnp.float32)
  for n, (layers, _) in enumerate(SLICES):
    x = x if n == 0 else _max_pool(x)
    for layer in layers:
      x = jax.nn.relu(_conv(params, f'net.slice{n + 1}.{layer}', x))
    first, second = jnp.split(_unit(x.astype(jnp.float32)), 2)
    weights = params[f'lin{n}.model.1.kernel'].reshape(-1)
    total += (jnp.square(first - second) @ weights).mean((1, 2))
  return total


def _conv(params: Params, name: str, x: jax.Array) -> jax.Array:
  kernel, bias = (params[f'{name}.{leaf}'].astype(x.dtype) for leaf in ('kernel', 'bias'))
  y = lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return y + bias


def _max_pool(x: jax.Array) -> jax.Array:
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))  # Its gradient needs no scatter.


def _unit(x: jax.Array) -> jax.Array:
  """Divides by the length over channels. Where all are zero the gradient is zero, not NaN."""
  squares = jnp.square(x).sum(-1, keepdims=True)
  return x / (jnp.sqrt(jnp.maximum(squares, 1e-30)) + 1e-10)
