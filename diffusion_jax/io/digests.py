"""Digests of arrays that live on devices, to notice storage that changed.

Orbax gives back damaged array data without a word, so each checkpoint carries one digest a leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  """Two sums of all words, each times an odd number that depends on its place: [2] uint32.

  Modulo 2^32 an odd factor never hides a change of one word, and sums come out the same however
  the array is sharded. Two different factors make it unlikely that several changes cancel.
  """
  words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  scattered = (place + 1) * jnp.uint32(2654435761)
  scattered ^= scattered >> 15
  factors = (2 * place + 1, 2 * scattered + 1)
  return jnp.stack([jnp.sum(words * factor, dtype=jnp.uint32) for factor in factors])


def digests(tree: Any) -> dict[str, list[int]]:
  """{path of a leaf: its digest} of a pytree of arrays."""
  leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  # One small program for each shape, which parameters, averages and moments share: one for all
  # leaves would be compiled anew for every tree.
  # And one after another: many programs that wait for each other's devices, all under way at once,
  # can take every thread of XLA's CPU backend and never end.
  found = [jax.device_get(_digest(leaf)) for leaf in leaves.values()]
  return {path: digest.tolist() for path, digest in zip(leaves, found, strict=True)}
