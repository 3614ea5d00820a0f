"""Attention by JAX's kernel for TPUs, whose logits never leave a core, forwards and backwards."""

import math

import jax
import jax.numpy as jnp

LANES, LARGEST = 128, 512
"""Queries or keys of a block: a multiple of the first, at most the second."""


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v: q [b n h d], k and v [b l h d] -> [b n h d].

  Lengths are filled up to whole blocks, and heads to whole lanes, as older versions of the kernel
  demand and as they lie in a TPU's memory anyway. Queries take the factor 1 / sqrt(d) in their own
  type, which for bfloat16 and a d that is no power of 4 rounds them once more.

  Args:
    interpret: whether to run the kernel by the interpreter that any platform has.
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
