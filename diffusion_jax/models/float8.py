"""Matrix products of numbers of eight bits, which some chips multiply at twice the speed.

After Micikevicius et al. 2022 ("FP8 formats for deep learning"): inputs and weights in E4M3,
gradients in E5M2. Each array is scaled as a whole by its own largest entry, which then is the
largest number of its type; sums are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax.models.checks import require
from diffusion_jax.xla import chip

PRODUCTS = ('plain', 'float8')
"""plain: in the network's own type. float8: those of dense layers over tokens, forward and
backward; what is said of an image as a whole, such as its time, stays plain."""

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

MULTIPLE = 16
"""cuBLAS multiplies such matrices where their lengths are multiples of it."""


class Scaled(NamedTuple):
  """An array of float8 and what it is to be multiplied with, float32 []."""

  values: jax.Array
  scale: jax.Array


def check_products(products: str) -> None:
  """Raises UserError where products of that kind are no quicker here, or cannot be had at all."""
  platform, capability = chip()
  found = '.'.join(map(str, capability or (platform,)))
  require(
    products == 'plain' or (capability or (0, 0)) >= (8, 9),
    f'products {products!r} cannot serve here: it needs an NVIDIA GPU of compute capability 8.9 or '
    f'more, and here is {found}; set products to plain.',
  )


def fits(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether x [... i] are tokens, and the kernel [i o] has lengths that such products take."""
  return x.ndim > 2 and all(length % MULTIPLE == 0 for length in kernel.shape)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [... i] times kernel [i o], in x's type; NaN where either is not finite."""
  return _forward_product(x, kernel)[0]


def _forward_product(x: jax.Array, kernel: jax.Array):
  left, right = _scaled(x, FORWARD), _scaled(kernel, FORWARD)
  y = _dot(left, right, ((x.ndim - 1,), (0,))).astype(x.dtype)
  return y, (left, right, kernel)


def _backward_product(kept: tuple[Scaled, Scaled, jax.Array], dy: jax.Array):
  left, right, kernel = kept
  slope, rows = _scaled(dy, BACKWARD), tuple(range(dy.ndim - 1))
  dx = _dot(slope, right, ((dy.ndim - 1,), (1,))).astype(dy.dtype)
  return dx, _dot(left, slope, (rows, rows)).astype(kernel.dtype)


product.defvjp(_forward_product, _backward_product)


def _scaled(x: jax.Array, dtype: jnp.dtype) -> Scaled:
  x, top = x.astype(jnp.float32), float(jnp.finfo(dtype).max)
  scale = jnp.maximum(jnp.abs(x).max() / top, jnp.finfo(jnp.float32).tiny)
  # Rounded up, the largest entry would be beyond the type, which makes NaN of it.
  return Scaled(jnp.clip(x / scale, -top, top).astype(dtype), scale)


def _dot(a: Scaled, b: Scaled, contracted: tuple) -> jax.Array:
  y = lax.dot_general(
    a.values, b.values, (contracted, ((), ())), preferred_element_type=jnp.float32
  )
  return y * (a.scale * b.scale)
