"""Sums over many values as products, which XLA for CPUs hands to a library.

A reduction of its own becomes two to five kernels there, each compiled for its shape (8 ms), and
sums over all rows of a matrix at a tenth of the speed. Elsewhere these are the reductions they look
like.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax.layout import mesh_sizes
from diffusion_jax.xla import settled

WIDTH = 8
"""Of the products that stand for sums of squares: as many columns times themselves."""


def _products() -> bool:
  return jax.default_backend() == 'cpu'


def over_leading(x: jax.Array) -> jax.Array:
  """Sum over all but the last dimension, float32: [... c] -> [c]."""
  x = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - 1))
  if not _products() or not axes:
    return x.sum(axes)
  return lax.dot_general(jnp.ones(x.shape[:-1], jnp.float32), x, ((axes, axes), ((), ())))


def over_positions(x: jax.Array) -> jax.Array:
  """Sum over positions, float32: [b n c] -> [b c]."""
  x = x.astype(jnp.float32)
  if not _products():
    return x.sum(1)
  return lax.dot_general(jnp.ones(x.shape[:2], jnp.float32), x, (((1,), (1,)), ((0,), (0,))))


def along_features(x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """Sum along the last dimension, of x or of x times weight [c], float32: [... c] -> [... 1]."""
  x = x.astype(jnp.float32)
  if not _products():
    return (x if weight is None else x * weight).sum(-1, keepdims=True)
  weight = jnp.ones(x.shape[-1], jnp.float32) if weight is None else weight
  return (x @ weight)[..., None]


def over_groups(s: jax.Array, groups: int) -> jax.Array:
  """Mean over the channels of each group, at each of its channels: [b c] -> [b c], float32."""
  b, c = s.shape
  if not _products():
    return jnp.repeat(s.reshape(b, groups, -1).mean(-1), c // groups, axis=-1)
  group = jnp.arange(c) * groups // c
  return s @ ((group[:, None] == group) * (groups / c))


def of_squares(arrays: Iterable[jax.Array]) -> jax.Array:
  """Sum of the squares of all entries of all arrays, float32, scalar."""
  arrays = [x.astype(jnp.float32) for x in arrays]
  # Of products of what is split over columns and put into shape, the partitioner gave wrong sums.
  if not _products() or mesh_sizes():
    return sum((jnp.square(x).sum() for x in arrays), jnp.zeros((), jnp.float32))
  wide = lambda x: x.ndim > 1 and x.shape[-1] % WIDTH == 0
  vectors = [x.ravel() for x in arrays if not wide(x)]
  total = jnp.zeros((), jnp.float32)
  if vectors:
    total = jnp.square(settled(jnp.concatenate(vectors))).sum()
  products = [_product(x) for x in arrays if wide(x)]
  return total + jnp.trace(sum(products)) if products else total


@jax.jit  # So that arrays of one shape are traced once.
def _product(x: jax.Array) -> jax.Array:
  """[... c] -> [WIDTH WIDTH], with the sums of squares of each WIDTH-th column on the diagonal."""
  x = x.reshape(*x.shape[:-1], x.shape[-1] // WIDTH, WIDTH)
  axes = tuple(range(x.ndim - 1))
  return lax.dot_general(x, x, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x [... c] + bias [c], in x's type; the bias' gradient is summed in float32."""
  return x + bias.astype(x.dtype)


def _added(x: jax.Array, bias: jax.Array):
  return add_bias(x, bias), bias


def _gradients(bias: jax.Array, dy: jax.Array):
  return dy, over_leading(dy).astype(bias.dtype)


add_bias.defvjp(_added, _gradients)
