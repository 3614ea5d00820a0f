"""Attention in pieces that stay in a processor's cache, forwards and backwards, for CPUs.

As in FlashAttention (Dao et al. 2022, algorithm 2 and appendix B) nothing of the size queries x
keys outlives its piece: the backward pass keeps the logarithms of the softmax's denominators, and
computes the weights again from them. Weights lie as [keys, queries], so that the largest of each
query's logits is found over rows of contiguous queries, and all five products read them in the
order in which they lie.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

LOGITS, ROWS = 2**20, 256
"""Of a piece, at most: logits (4 MB), and queries of one head."""


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
  """How many of so many heads one piece takes, of each so many logits."""
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
