"""Digests of arrays that live on devices, to notice storage that changed.

Orbax gives back damaged array data without a word, so each checkpoint carries one digest a leaf. A
digest is a sum over all words, so each process adds up the parts that it holds, and no program
waits for another device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.parallel.agreement import sum_over_processes

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _words(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  return words if x.dtype.itemsize == 8 else words[..., None]


def _digest(x: jax.Array, start: tuple, shape: tuple[int, ...]) -> jax.Array:
  """The share [2] uint32 of the part x, which begins at `start` in an array of `shape`.

  Two sums of all words, each times an odd number that depends on its place in the whole array.
  Modulo 2^32 an odd factor never hides a change of one word. Two different factors make it unlikely
  that several changes cancel.
  """
  words = _words(x)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, (first, size) in enumerate(zip((*start, 0), (*shape, words.shape[-1]), strict=True)):
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(size % 2**32) + jnp.asarray(first, jnp.uint32) + index
  scattered = (place + 1) * jnp.uint32(2654435761)
  scattered ^= scattered >> 15
  factors = (2 * place + 1, 2 * scattered + 1)
  return jnp.stack([jnp.sum(words * factor, dtype=jnp.uint32) for factor in factors])


_digest_part = jax.jit(_digest, static_argnums=2)


@functools.lru_cache(maxsize=1024)
def _digest_parts(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> Callable:
  """One program for the parts on all devices of a mesh: -> [devices 2], a row on each device."""

  def part(x: jax.Array) -> jax.Array:
    names = (*spec, *(None,) * (x.ndim - len(spec)))
    start = tuple(
      0 if name is None else jax.lax.axis_index(name) * size
      for name, size in zip(names, x.shape, strict=True)
    )
    return _digest(x, start, shape)[None]

  rows = PartitionSpec(mesh.axis_names)
  return jax.jit(jax.shard_map(
    part, mesh=mesh, in_specs=spec, out_specs=rows, check_vma=False
  ))


def _dispatch(x: jax.Array) -> list[jax.Array]:
  """Shares of the parts of x that this process answers for; each part has one first replica."""
  own = [shard for shard in x.addressable_shards if shard.replica_id == 0]
  if isinstance(x.sharding, NamedSharding) and x.sharding.mesh.size > 1:
    rows = _digest_parts(x.sharding.mesh, x.sharding.spec, x.shape)(x)
    by_device = {shard.device: shard.data for shard in rows.addressable_shards}
    return [by_device[shard.device] for shard in own]
  return [
    _digest_part(shard.data, tuple(np.uint32(s.start or 0) for s in shard.index), x.shape)
    for shard in own
  ]


def local_digests(tree: Any) -> Callable[[], dict[str, list[int]]]:
  """Starts to add up this process's shares of the digests of a pytree of arrays.

  Nothing waits for the devices before the returned function is called, from any thread; the arrays
  may be donated at once.

  Returns:
    A function that gives {path of a leaf: its two sums here, modulo 2^32}.
  """
  started = {
    jax.tree_util.keystr(path): _dispatch(jnp.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }

  def fetch() -> dict[str, list[int]]:
    found = jax.device_get(started)
    return {
      path: np.sum([np.reshape(part, 2) for part in parts], axis=0, dtype=np.uint32).tolist()
      if parts else [0, 0]
      for path, parts in found.items()
    }

  return fetch


def add_up(shares: list[dict[str, list[int]]]) -> dict[str, list[int]]:
  """The digests of whole arrays from the shares of all processes."""
  return {
    path: [sum(share[path][i] for share in shares) % 2**32 for i in range(2)]
    for path in shares[0]
  }


def digests(tree: Any) -> dict[str, list[int]]:
  """{path of a leaf: its digest} of whole arrays; all processes must call it together."""
  local = local_digests(tree)()
  total = sum_over_processes(np.asarray(list(local.values()), np.uint32).reshape(-1, 2))
  return dict(zip(local, total.tolist(), strict=True))
