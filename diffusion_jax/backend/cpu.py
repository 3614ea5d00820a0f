"""Faster forms for XLA on CPUs: sums as matrix products, convolutions in loops, AdamW in one pass.

There a reduction becomes two to five kernels, each compiled for its shape (8 ms), and sums over the
rows of a matrix run at a tenth of the speed; products go to a library. Elsewhere these are plain
reductions.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.custom_derivatives import SymbolicZero

from diffusion_jax.backend.xla import on_cpu, optimization_barrier
from diffusion_jax.parallel.layout import mesh_sizes
from diffusion_jax.types import Params

Padding = tuple[tuple[int, int], tuple[int, int]]
"""(top, bottom), (left, right)."""
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
"""Of images, kernels and what comes out of convolutions."""
WIDTH = 8
"""Columns that are multiplied with themselves at a time, in sums of squares."""


def over_leading(x: jax.Array) -> jax.Array:
  """Sum over all but the last dimension, float32: [... c] -> [c]."""
  x = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - 1))
  if not on_cpu() or not axes:
    return x.sum(axes)
  return lax.dot_general(jnp.ones(x.shape[:-1], jnp.float32), x, ((axes, axes), ((), ())))


def over_positions(x: jax.Array) -> jax.Array:
  """Sum over positions, float32: [b n c] -> [b c]."""
  x = x.astype(jnp.float32)
  if not on_cpu():
    return x.sum(1)
  return lax.dot_general(jnp.ones(x.shape[:2], jnp.float32), x, (((1,), (1,)), ((0,), (0,))))


def along_features(x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """Sum along the last dimension, of x or of x times weight [c], float32: [... c] -> [... 1]."""
  x = x.astype(jnp.float32)
  if not on_cpu():
    return (x if weight is None else x * weight).sum(-1, keepdims=True)
  weight = jnp.ones(x.shape[-1], jnp.float32) if weight is None else weight
  return (x @ weight)[..., None]


def over_groups(s: jax.Array, groups: int) -> jax.Array:
  """Mean over the channels of each group, at each of its channels: [b c] -> [b c], float32."""
  b, c = s.shape
  if not on_cpu():
    return jnp.repeat(s.reshape(b, groups, -1).mean(-1), c // groups, axis=-1)
  group = jnp.arange(c) * groups // c
  return s @ ((group[:, None] == group) * (groups / c))


def sum_of_squares(arrays: Iterable[jax.Array]) -> jax.Array:
  """Sum of the squares of all entries of all arrays, float32, scalar."""
  arrays = [x.astype(jnp.float32) for x in arrays]
  # Of products of what is split over columns and put into shape, the partitioner gave wrong sums.
  if not on_cpu() or mesh_sizes():
    return sum((jnp.square(x).sum() for x in arrays), jnp.zeros((), jnp.float32))
  wide = lambda x: x.ndim > 1 and x.shape[-1] % WIDTH == 0
  vectors = [x.ravel() for x in arrays if not wide(x)]
  total = jnp.zeros((), jnp.float32)
  if vectors:
    total = jnp.square(optimization_barrier(jnp.concatenate(vectors))).sum()
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


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """Convolution of x [b h w i] with kernel [k k i o], whose gradients are fast in loops, too.

  These are convolutions with their axes in other places. XLA puts them into the order that its
  libraries know outside of loops alone: within one, such as a sampler's, they are left to plain
  nested loops, ten to thirty times slower. So the order is made here.
  """
  # The partitioner knows gradients by their axes, and splits them best as they are.
  ordered = on_cpu() and not mesh_sizes()
  return (_convolve if ordered else _plain)(x, kernel, stride, padding)


def _plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT)


_convolve = jax.custom_jvp(_plain, nondiff_argnums=(2, 3))


@partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(stride, padding, primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y, is_zero = _convolve(x, kernel, stride, padding), lambda t: isinstance(t, SymbolicZero)
  dy = jnp.zeros_like(y)
  if not is_zero(dx):
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    # A convolution with `turned` turned back: its transpose takes `turned` as it is.
    dy = dy + lax.conv_general_dilated(
      dx, turned[::-1, ::-1], (stride, stride), padding, dimension_numbers=('NHWC', 'HWOI', 'NHWC')
    )
  if not is_zero(dkernel):
    of_kernel = partial(_kernel_gradient, x, kernel.shape, stride, padding)
    # Of what gives the gradient the transpose, whose own is that again.
    dy = dy + jax.linear_transpose(of_kernel, y)(dkernel)[0]
  return y, dy


def _kernel_gradient(
  x: jax.Array, shape: tuple[int, ...], stride: int, padding: Padding, dy: jax.Array
) -> jax.Array:
  """Return the gradient in a kernel of that shape: channels are examples, examples channels."""
  ends = [
    (low, k + (after - 1) * stride - before - low)
    for k, before, after, (low, _) in zip(shape, x.shape[1:], dy.shape[1:], padding, strict=False)
  ]
  found = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), ends, rhs_dilation=(stride, stride),
    dimension_numbers=LAYOUT,
  )
  return found.transpose(1, 2, 0, 3)


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm over all leaves, float32. Scalar."""
  return jnp.sqrt(sum_of_squares(jax.tree.leaves(tree)))


def adamw(
  schedule: optax.Schedule, b1: float, b2: float, eps: float, *, clip_norm: float,
  decays: Mapping[str, float], factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
  """AdamW (Loshchilov & Hutter 2019, algorithm 2) on parameters by name.

  update(gradients, state, parameters, use=True, norm=None): where `use` is False, a scalar, updates
  are zero and the state stays as it is, whatever the gradients hold. norm: of all gradients, by
  `global_norm`, where it is known.

  Args:
    schedule: learning rate of update n = 0, 1, ...
    clip_norm: largest norm of the gradient over all that is trained; 0 for none.
    decays: weight decay of each parameter, times the learning rate.
    factors: on the learning rate of each parameter; what has 0 is not trained.
  """
  trained = [name for name, factor in factors.items() if factor]

  def init(params: Params) -> optax.ScaleByAdamState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

  # Jitted, so that what is alike for all parameters of one shape is traced once.
  @partial(jax.jit, static_argnames='decay')
  def one(p, mu, nu, g, scale, use, first, second, rate, *, decay):
    g = g * scale
    mu = lax.select(use, b1 * mu + (1 - b1) * g, mu)
    nu = lax.select(use, b2 * nu + (1 - b2) * jnp.square(g), nu)
    direction = mu * first / (lax.sqrt(nu * second) + eps)
    direction = direction + decay * p if decay else direction
    return (rate * direction).astype(p.dtype), mu, nu

  def update(
    grads: Params, state: optax.ScaleByAdamState, params: Params, *, use=True, norm=None, **_
  ):
    if norm is None or len(trained) < len(grads):
      norm = global_norm([grads[name] for name in trained])
    scale = jnp.minimum(1.0, clip_norm / norm) if clip_norm else 1.0
    use = jnp.asarray(use)
    count = state.count + use
    # Kept apart from zero, as it is before the first update that is used.
    n = jnp.maximum(count, 1).astype(jnp.float32)
    first, second = 1 / (1 - b1**n), 1 / (1 - b2**n)
    rate = jnp.where(use, schedule(state.count), 0.0)
    rates = {factor: -rate * factor for factor in set(factors.values())}
    updates = {name: jnp.zeros_like(p) for name, p in params.items() if not factors[name]}
    mu, nu = dict(state.mu), dict(state.nu)
    for name in trained:
      updates[name], mu[name], nu[name] = one(
        params[name], mu[name], nu[name], grads[name], scale, use, first, second,
        rates[factors[name]], decay=decays[name],
      )
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)
