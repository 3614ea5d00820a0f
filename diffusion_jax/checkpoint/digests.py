"""Digests of arrays on devices, which reveal damaged data: Orbax returns those unnoticed.

A digest is a sum over all words, so each process adds up its own and waits for no other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.parallel.processes import sum_over_processes

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _words(x: jax.Array) -> jax.Array:
  """Return the bits of x as words of at most 32 bits; 8-byte numbers get another axis [... 2]."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])


def _places(part: tuple[int, ...], start: tuple, shape: tuple[int, ...]) -> jax.Array:
  """Flat indices, in an array of `shape`, of the part that begins at `start`.

  Axes that the part covers in full are merged with those before: splitting an index costs most.
  """
  axes = [(1, 0, 1)]
  for size, first, whole in zip(part, start, shape, strict=True):
    if size == whole:
      axes[-1] = tuple(value * whole for value in axes[-1])
    else:
      axes.append((size, first, whole))
  sizes = tuple(size for size, _, _ in axes)
  place = jnp.zeros(sizes, jnp.uint32)
  for axis, (_, first, whole) in enumerate(axes):
    index = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis)
    place = place * jnp.uint32(whole % 2**32) + jnp.asarray(first, jnp.uint32) + index
  return place


def _digest(x: jax.Array, start: tuple, shape: tuple[int, ...]) -> jax.Array:
  """The summand [2] uint32 of the part x, which begins at `start` in an array of `shape`.

  Two sums of all words, each times an odd number by its place: modulo 2^32 one changed word always
  shows, and several hardly ever cancel in both.
  """
  words = _words(x)
  more = words.shape[x.ndim :]
  place = _places(words.shape, (*start, *(0 for _ in more)), (*shape, *more))
  words = words.reshape(place.shape).astype(jnp.uint32)
  scattered = (place + 1) * jnp.uint32(2654435761)
  scattered ^= scattered >> 15
  # Both sums in one reduction: on a CPU three times as fast as one after the other.
  sums = jax.lax.reduce(
    (words * (2 * place + 1), words * (2 * scattered + 1)), (jnp.uint32(0),) * 2,
    lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(place.ndim)),
  )
  return jnp.stack(sums)


_digest_part = jax.jit(_digest, static_argnums=2)


@functools.lru_cache(maxsize=1024)
def _digest_parts(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> Callable:
  """Compile one program for the parts on all devices of a mesh: -> [devices 2], a row on each."""

  def part(x: jax.Array) -> jax.Array:
    names = (*spec, *(None,) * (x.ndim - len(spec)))
    start = tuple(
      0 if name is None else jax.lax.axis_index(name) * size
      for name, size in zip(names, x.shape, strict=True)
    )
    return _digest(x, start, shape)[None]

  rows = PartitionSpec(mesh.axis_names)
  return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=rows, check_vma=False))


def _dispatch(x: jax.Array) -> list[jax.Array]:
  """Start the summands of the parts of x whose first replica is here."""
  if not isinstance(x, jax.Array):
    x = jnp.asarray(x)
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
  """Start the sums over this process's part of a pytree; the arrays may be donated at once.

  The result, called from any thread, waits for {path of a leaf: its two sums here}.
  """
  started = {
    jax.tree_util.keystr(path): _dispatch(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }

  def fetch() -> dict[str, list[int]]:
    found = jax.device_get(started)
    return {
      path: np.asarray(parts, np.uint32).reshape(-1, 2).sum(axis=0, dtype=np.uint32).tolist()
      for path, parts in found.items()
    }

  return fetch


def add_up(parts: list[dict[str, list[int]]]) -> dict[str, list[int]]:
  """Digests of whole arrays, from the sums of all processes."""
  return {
    path: [sum(part[path][i] for part in parts) % 2**32 for i in range(2)] for path in parts[0]
  }


def digests(tree: Any) -> dict[str, list[int]]:
  """Return {path of a leaf: its digest}; all processes must call it together."""
  local = local_digests(tree)()
  total = sum_over_processes(np.asarray(list(local.values()), np.uint32).reshape(-1, 2))
  return dict(zip(local, total.tolist(), strict=True))
