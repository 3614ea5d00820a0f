"""Kinds of adapters: what each makes of a layer's weight, a row each in KINDS.

Parts of LoRA are in our layout; those of all others are as in files, for a weight W [o i] or
[o i k k], so that what is read is written to the bit. Changes are of our kernels [i o], [k k i o],
in float32. All but `full` begin as nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.errors import require
from diffusion_jax.models.layers import kernel_init

Parts = Mapping[str, Any]
MAGNITUDE = 'magnitude'
"""The part of DoRA: the norms of W by outputs [o 1 ...], or by inputs [1 i ...]."""
BIAS = 'bias'
"""A part that changes the layer's bias [o], scaled as the weight; of files alone."""
WHOLE_BIAS = 'diff_b'
"""The same, as it is."""

# As `kernel_init`, of weights whose inputs come last.
_init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2)
_zeros = nnx.initializers.zeros


class Rows(NamedTuple):
  """The outputs of a larger layer that an adapter is of: those from `start` on of `total`.

  swapped: its halves are stored in the other order.
  """

  total: int
  start: int = 0
  swapped: bool = False


class Rank(NamedTuple):
  """Size and kind of one adapter; its change of the weight is scaled by alpha / rank.

  dora: its sum with the weight is normalised and has learned norms. factor: of LoKr, see `factors`.
  rows: for adapters of layers that are several of the network's.
  """

  rank: int
  alpha: float
  kind: str = 'lora'
  dora: bool = False
  factor: int = -1
  rows: Rows | None = None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Kind(NamedTuple):
  """start: (kernel's shape, size) -> {part: (its shape, its initializer)} of a new one.

  delta: (parts, kernel, size) -> the change of the kernel, scaled. additive: it does not depend on
  the kernel's values, so that DoRA fits and its strength scales it. rank: from the parts of a file.
  """

  start: Callable[[tuple[int, ...], Rank], dict[str, tuple[tuple[int, ...], Callable]]]
  delta: Callable[[Parts, jax.Array, Rank], jax.Array]
  rank: Callable[[Parts], int]
  parts: tuple[str, ...]
  additive: bool = True


def factors(size: int, factor: int = -1) -> tuple[int, int]:
  """Two factors of a size, the smaller first: `factor` and the rest where it divides it, else the
  nearest to each other with the smaller at most `factor`, if that is positive (LyCORIS)."""
  if factor > 0 and size % factor == 0:
    small, large = sorted((factor, size // factor))
    return small, large
  most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
  small = next(n for n in range(max(most, 1), 0, -1) if size % n == 0)
  return small, size // small


def published(kernel: jax.Array) -> jax.Array:
  """[i o] -> [o i], [k k i o] -> [o i k k]."""
  return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def ours(weight: jax.Array) -> jax.Array:
  """Invert `published`."""
  return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def _f32(parts: Parts) -> dict[str, jax.Array]:
  return {name: value.astype(jnp.float32) for name, value in parts.items()}


def _shape(kernel: Any, size: Rank) -> tuple[int, ...]:
  """The published shape of the layer that the parts are of."""
  *window, i, o = kernel.shape
  return (size.rows.total if size.rows else o, i, *window)


# LoRA (Hu et al. 2022, eq. 3): A B.


def _lora_start(kernel, size):
  *window, i, o = kernel
  return {
    'a': ((*window, i, size.rank), kernel_init),
    'b': ((*(1 for _ in window), size.rank, o), _zeros),
  }


def _lora_delta(p, kernel, size):
  return size.scale * (p['a'] @ p['b'].reshape(p['b'].shape[-2:]))


# LoHa (Hyeon-Woo et al. 2022, eq. 4): (W1a W1b) * (W2a W2b), elementwise.


def _loha_start(kernel, size):
  *window, i, o = kernel
  i, r = i * math.prod(window), size.rank
  return {
    'w1_a': ((o, r), _init), 'w1_b': ((r, i), _init), 'w2_a': ((o, r), _zeros),
    'w2_b': ((r, i), _init),
  }


def _tucker(core: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """core [r s k k], a [r o], b [s i] -> [o i k k]."""
  return jnp.einsum('rs...,ro,si->oi...', core, a, b)


def _product(p: Parts, which: str) -> jax.Array:
  """The weight of two matrices, or of those and a core."""
  a, b, core = p[f'w{which}_a'], p[f'w{which}_b'], p.get(f't{which}')
  return a @ b if core is None else _tucker(core, a, b)


def _loha_delta(p, kernel, size):
  product = _product(p, '1') * _product(p, '2')
  return size.scale * ours(product.reshape(_shape(kernel, size)))


# LoKr (Edalati et al. 2022; Yeh et al. 2024): the Kronecker product of W1 and W2.


def _lokr_start(kernel, size):
  *window, i, o = kernel
  (o1, o2), (i1, i2) = factors(o, size.factor), factors(i, size.factor)
  out = {'w1': ((o1, i1), _init)}
  if size.rank >= max(o2, i2) / 2:
    return out | {'w2': ((o2, i2, *window), _zeros)}
  return out | {
    'w2_a': ((o2, size.rank), _init), 'w2_b': ((size.rank, i2 * math.prod(window)), _zeros),
  }


def _lokr_delta(p, kernel, size):
  """W2 [o i] of a convolution may have its window [o i k k], or in its inputs [o (i k k)]."""
  w1 = p['w1'] if 'w1' in p else _product(p, '1')
  w2 = p['w2'] if 'w2' in p else _product(p, '2')
  shape = _shape(kernel, size)
  w2 = w2.reshape(shape[0] // w1.shape[0], shape[1] // w1.shape[1], *shape[2:])
  product = jnp.einsum('ab,cd...->acbd...', w1, w2).reshape(shape)
  return size.scale * ours(product)


def _lokr_rank(parts):
  """1 where both factors are whole."""
  return next((parts[n].shape[0] for n in ('w2_b', 'w1_b') if n in parts), 1)


# OFT (Qiu et al. 2023, eq. 2 and 6): W is multiplied by blocks of rotations, by Cayley's transform
# of a skew Q. Of outputs as in LyCORIS and kohya's scripts, or of inputs as in PEFT.


def cayley(skew: jax.Array) -> jax.Array:
  """(I + Q) (I - Q)^-1 of skew Q [... n n]."""
  eye = jnp.eye(skew.shape[-1], dtype=skew.dtype)
  # Both factors commute.
  return jnp.linalg.solve(eye - skew, eye + skew)


def _diag_oft_start(kernel, size):
  block, count = factors(kernel[-1], size.rank)
  return {'blocks': ((count, block, block), _zeros)}


def _diag_oft_delta(p, kernel, size):
  """alpha is the largest norm of Q for each output; 0 for any."""
  weight, blocks = published(kernel.astype(jnp.float32)), p['blocks']
  skew, most = blocks - blocks.swapaxes(1, 2), size.alpha * weight.shape[0]
  if size.alpha > 0:
    norm = jnp.sqrt(jnp.sum(jnp.square(skew)) + 1e-16)  # So that it has a gradient at zero.
    skew = skew * jnp.minimum(1.0, most / norm)
  turn = cayley(skew) - jnp.eye(blocks.shape[-1])
  split = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
  change = jnp.einsum('knm,kn...->km...', turn, split).reshape(weight.shape)
  if 'rescale' in p:
    rescale = p['rescale'].reshape(-1, *(1 for _ in weight.shape[1:]))
    change = rescale * change + (rescale - 1) * weight
  return ours(change)


def block_size(entries: int) -> int:
  """Return n of a skew matrix [n n] with so many entries above its diagonal; or 0."""
  n = (1 + math.isqrt(1 + 8 * entries)) // 2
  return n if n * (n - 1) // 2 == entries else 0


def _oft_start(kernel, size):
  *window, i, _ = kernel
  inputs, n = i * math.prod(window), size.rank
  require(
    n > 1 and inputs % n == 0, f'lora.rank is {n}, the block of oft, which must be at least 2 and '
    f'divide the inputs of each layer, of which one has {inputs}; choose another, or diag_oft.',
  )
  return {'skew': ((inputs // n, n * (n - 1) // 2), _zeros)}


def _oft_delta(p, kernel, size):
  """One block is for all where there are fewer. alpha: terms of Neumann's series; 0: exact."""
  weight, vectors = published(kernel.astype(jnp.float32)), p['skew']
  n = block_size(vectors.shape[1])
  upper = jnp.zeros((len(vectors), n, n)).at[:, *jnp.triu_indices(n, 1)].set(vectors)
  turn = _series(upper - upper.swapaxes(1, 2), int(size.alpha)) - jnp.eye(n)
  split = weight.reshape(weight.shape[0], -1, n)
  turn = jnp.broadcast_to(turn, (split.shape[1], n, n))
  return ours(jnp.einsum('obk,bck->obc', split, turn).reshape(weight.shape).astype(jnp.float32))


def _series(skew: jax.Array, terms: int) -> jax.Array:
  """PEFT's rotation: Cayley's transform of -Q, or I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1)."""
  eye = jnp.broadcast_to(jnp.eye(skew.shape[-1]), skew.shape)
  if terms == 0:
    return cayley(-skew)
  last = max(terms - 1, 3) if terms > 2 else terms - 1
  total, power = eye, eye
  for number in range(1, last + 1):
    power = power @ skew
    total = total + (power if number == last > 2 else 2.0 * power)
  return total


# A whole difference.


def _full_start(kernel, size):
  del size
  *window, i, o = kernel
  return {'diff': ((o, i, *window), _zeros)}


def _full_delta(p, kernel, size):
  if 'diff' not in p:  # Of the bias alone.
    return jnp.zeros(kernel.shape)
  return size.scale * ours(p['diff'].reshape(_shape(kernel, size)))


_LOHA = ('w1_a', 'w1_b', 'w2_a', 'w2_b', 't1', 't2')
_ONE = lambda parts: 1
KINDS: dict[str, Kind] = {
  'lora': Kind(_lora_start, _lora_delta, lambda p: p['a'].shape[-1], ('a', 'b')),
  'loha': Kind(_loha_start, _loha_delta, lambda p: p['w1_b'].shape[0], _LOHA),
  'lokr': Kind(_lokr_start, _lokr_delta, _lokr_rank,
               ('w1', 'w1_a', 'w1_b', 'w2', 'w2_a', 'w2_b', 't2')),
  'oft': Kind(_oft_start, _oft_delta, _ONE, ('skew',), additive=False),
  'diag_oft': Kind(_diag_oft_start, _diag_oft_delta, _ONE, ('blocks', 'rescale'), additive=False),
  'full': Kind(_full_start, _full_delta, _ONE, ('diff',)),
}


def new_parts(kernel: tuple[int, ...], size: Rank, key: jax.Array) -> dict[str, jax.Array]:
  """Fresh parts, without DoRA's, with which the layer computes as before."""
  found = KINDS[size.kind].start(kernel, size)
  keys = jax.random.split(key, len(found))
  return {
    part: init(one, shape, jnp.float32)
    for one, (part, (shape, init)) in zip(keys, found.items(), strict=True)
  }


def magnitude(kernel: jax.Array) -> jax.Array:
  """The norms of a kernel by outputs, [o 1 ...] (Liu et al. 2024, eq. 5)."""
  return _norms(published(kernel.astype(jnp.float32)), (-1,))


def _norms(weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Norms by outputs, or by inputs where the shape is [1 i ...]."""
  by_inputs = shape[0] == 1 < weight.shape[0]
  axes = tuple(n for n in range(weight.ndim) if n != int(by_inputs))
  return jnp.sqrt(jnp.sum(jnp.square(weight), axes, keepdims=True))


def change(parts: Parts, kernel: Any, size: Rank, strength: float = 1.0) -> jax.Array:
  """The change of a kernel by an adapter, in float32; with a strength, so many times.

  DoRA: m (W + D) / |W + D| - W, whose norm is held constant in gradients (Liu et al. 2024, 4.3).
  """
  kind, p = KINDS[size.kind], _f32(parts)
  if kind.additive and not size.dora:
    size = size._replace(alpha=strength * size.alpha)
    return _own_rows(kind.delta(p, kernel, size), kernel, size)
  delta = _own_rows(kind.delta(p, kernel, size), kernel, size)
  if size.dora:
    base = kernel.astype(jnp.float32)
    weight, norms = published(base + delta), p[MAGNITUDE]
    held = jax.lax.stop_gradient(_norms(weight, norms.shape))
    delta = ours(weight * (norms / jnp.maximum(held, 1e-30))) - base
  return strength * delta


def _own_rows(delta: jax.Array, kernel: jax.Array, size: Rank) -> jax.Array:
  if size.rows is None:
    return delta
  if size.rows.swapped:
    delta = jnp.roll(delta, delta.shape[-1] // 2, axis=-1)
  return delta[..., size.rows.start : size.rows.start + kernel.shape[-1]]
