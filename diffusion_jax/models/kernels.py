"""Attention in pieces, and 8-bit matrix products, which compilers do not find themselves.

`chunked` is attention for CPUs in pieces that fit a processor's cache. As in FlashAttention (Dao et
al. 2022, algorithm 2 and appendix B) no queries x keys array outlives its piece: the backward pass
keeps the logarithms of the softmax's denominators and recomputes the weights. Weights are
[keys, queries], so that maxima run over rows of contiguous queries, and all five products read them
in order.

`splash` is JAX's kernel for TPUs, whose logits never leave a core.

`product` is of 8-bit floats, twice as fast on some chips (Micikevicius et al. 2022, "FP8 formats
for deep learning"): inputs and weights in E4M3, gradients in E5M2, each array scaled by its largest
entry to its type's largest number; sums are float32.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from diffusion_jax.backend.xla import chip
from diffusion_jax.errors import require

LOGITS, ROWS = 2**20, 256
"""The most logits (4 MB) and queries of one head in a piece."""


def chunked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v in float32: q [b n h d], k and v [b l h d] -> [b n h d]."""
  b, n, h, d = q.shape
  rows, parts = _rows(n, k.shape[1])
  columns = lambda x: x.astype(jnp.float32).transpose(0, 2, 3, 1).reshape(b * h, d, -1)
  queries = jnp.pad(columns(q) * d**-0.5, ((0, 0), (0, 0), (0, rows * parts - n)))
  y = _attend(queries, columns(k), columns(v), rows)[..., :n]
  return y.reshape(b, h, d, n).transpose(0, 3, 1, 2).astype(q.dtype)


def _rows(n: int, keys: int) -> tuple[int, int]:
  """(queries of a piece, pieces of a head), as even as they can be."""
  parts = math.ceil(n / max(1, min(ROWS, LOGITS // keys)))
  return math.ceil(n / parts), parts


def _heads(count: int, logits: int) -> int:
  """Return how many of so many heads one piece takes, of each so many logits."""
  return max(c for c in range(1, count + 1) if count % c == 0 and (c == 1 or c * logits <= LOGITS))


def _split(x: jax.Array, heads: int) -> jax.Array:
  """[B ...] -> [B / heads, heads, ...]."""
  return x.reshape(-1, heads, *x.shape[1:])


def _join(x: jax.Array) -> jax.Array:
  """[g c ...] -> [g * c ...]."""
  return x.reshape(-1, *x.shape[2:])


def _pieces(x: jax.Array, heads: int, rows: int) -> jax.Array:
  """[B d n] -> [B / heads, n / rows, heads, d, rows]."""
  return jnp.moveaxis(_split(x.reshape(*x.shape[:2], -1, rows), heads), 3, 1)


def _whole(x: jax.Array) -> jax.Array:
  """The inverse of `_pieces`."""
  x = _join(jnp.moveaxis(x, 1, 3))
  return x.reshape(*x.shape[:2], -1)


def _logits(k: jax.Array, q: jax.Array) -> jax.Array:
  return jnp.einsum('cdl,cdr->clr', k, q)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: int) -> jax.Array:
  """q [B d n] (scaled), k and v [B d l] -> [B d n], `rows` queries at a time."""
  return _forward(q, k, v, rows)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, rows: int):
  heads = _heads(len(q), rows * k.shape[-1])

  def piece(q, k, v_one):
    logits = _logits(k, q)
    top = logits.max(1, keepdims=True)
    # The row of ones below the values sums the weights.
    y = jnp.einsum('cdl,clr->cdr', v_one, jnp.exp(logits - top))
    total = y[:, -1:]
    return y[:, :-1] / total, top + jnp.log(total)

  def some(inputs):
    q, k, v_one = inputs
    return lax.map(lambda q: piece(q, k, v_one), q)

  v_one = jnp.concatenate([v, jnp.ones_like(v[:, :1])], 1)
  y, norm = lax.map(some, (_pieces(q, heads, rows), _split(k, heads), _split(v_one, heads)))
  y, norm = _whole(y), _whole(norm)
  return y, (q, k, v, y, norm)


def _backward(rows: int, saved, dy: jax.Array):
  q, k, v, y, norm = saved
  heads = _heads(len(q), rows * k.shape[-1])

  def some(inputs):
    q, k, v, dy, norm, dot = inputs

    def piece(total, inputs):
      q, dy, norm, dot = inputs
      weights = jnp.exp(_logits(k, q) - norm)
      dlogits = weights * (_logits(v, dy) - dot)
      to_keys = lambda x, w: jnp.einsum('clr,cdr->cld', w, x)
      total = (total[0] + to_keys(q, dlogits), total[1] + to_keys(dy, weights))
      return total, jnp.einsum('cdl,clr->cdr', k, dlogits)

    zero = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), k.dtype)
    return lax.scan(piece, (zero, zero), (q, dy, norm, dot))

  dot = (y * dy).sum(1, keepdims=True)
  pieces = [_pieces(x, heads, rows) for x in (q, dy, norm, dot)]
  (dk, dv), dq = lax.map(some, (pieces[0], _split(k, heads), _split(v, heads), *pieces[1:]))
  return _whole(dq), _join(dk).swapaxes(1, 2), _join(dv).swapaxes(1, 2)


_attend.defvjp(_forward, _backward)


LANES, LARGEST = 128, 512
"""A block has a multiple of LANES queries or keys, at most LARGEST."""


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v: q [b n h d], k and v [b l h d] -> [b n h d].

  Lengths are padded to whole blocks, heads to whole lanes, as older versions require and TPU memory
  does anyway. Queries are scaled by 1 / sqrt(d) in their own type: in bfloat16, unless d is a power
  of 4, rounded once more. interpret: run on any platform.
  """
  # Takes a second to import, and is of use on TPUs alone.
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  (_, n, h, d), keys = q.shape, k.shape[1]
  (rows, all_rows), (columns, all_columns) = _blocks(n), _blocks(keys)
  width = math.ceil(d / LANES) * LANES
  by_head = lambda x, length: jnp.pad(
    x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, width - d))
  )
  kernel = kernels.make_splash_mha(
    kernels.MultiHeadMask([kernels.FullMask((all_rows, all_columns))] * h),
    block_sizes=kernels.BlockSizes(
      block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows,
      block_kv_dq=columns,
    ),
    head_shards=1, q_seq_shards=1, interpret=interpret,
  )
  segments = None
  if all_columns > keys:  # Keys that fill up are of a segment that no query is of.
    filled = jnp.arange(all_columns, dtype=jnp.int32) >= keys
    segments = kernels.SegmentIds(jnp.zeros(all_rows, jnp.int32), filled.astype(jnp.int32))
  y = jax.vmap(kernel, (0, 0, 0, None))(
    by_head(q * jnp.asarray(d**-0.5, q.dtype), all_rows), by_head(k, all_columns),
    by_head(v, all_columns), segments,
  )
  return y[:, :, :n, :d].swapaxes(1, 2)


def _blocks(length: int) -> tuple[int, int]:
  """(length of a block, of all blocks together), as little filled up as it can be."""
  count = math.ceil(length / LARGEST)
  block = math.ceil(length / count / LANES) * LANES
  return block, count * block


FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

MULTIPLE = 16
"""cuBLAS multiplies such matrices where their lengths are multiples of it."""


class Scaled(NamedTuple):
  """An array of float8 and what it is to be multiplied with, float32 []."""

  values: jax.Array
  scale: jax.Array


def check_matmul_precision(precision: str, mesh: Mesh | None = None) -> None:
  """Raise UserError where such products are no quicker on the mesh, or cannot be had at all."""
  platform, capability = chip(mesh)
  found = '.'.join(map(str, capability or (platform,)))
  require(
    precision == 'plain' or (capability or (0, 0)) >= (8, 9),
    f'products {precision!r} cannot serve here: it needs an NVIDIA GPU of compute capability 8.9 '
    f'or more, and here is {found}; set products to plain.',
  )


def fits(x: jax.Array, kernel: jax.Array) -> bool:
  """Return whether x [... i] are tokens and the kernel [i o] has lengths for such products."""
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
