"""Encoding and decoding in parts, for batches and images whose activations do not fit in memory.

Works with every autoencoder here, that is with any object that has `encode`, `decode` and
`config.factor`. All functions can be jitted: shapes alone decide the parts, which lax.map takes one
after the other. For Stable Diffusion's autoencoder in float32, XLA's plan for CPUs needs for
activations 3.5 GiB to decode one image of 1024 x 1024 and 0.9 GiB in tiles, 7.0 GiB for eight of
512 x 512 and 0.9 GiB in slices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from diffusion_jax.models.checks import require
from diffusion_jax.types import Images, Latents


def encode_sliced(autoencoder: Any, images: Images, *, at_once: int = 1) -> Any:
  """autoencoder.encode(images), `at_once` images at a time; the same numbers in less memory."""
  return _sliced(autoencoder.encode, images, at_once)


def decode_sliced(autoencoder: Any, z: Latents, *, at_once: int = 1) -> Images:
  """autoencoder.decode(z), `at_once` images at a time; the same numbers in less memory."""
  return _sliced(autoencoder.decode, z, at_once)


def encode_tiled(autoencoder: Any, images: Images, *, tile: int = 64, overlap: int = 16) -> Any:
  """autoencoder.encode(images) from overlapping tiles; `tile` and `overlap` are in latent cells.

  See `decode_tiled`. Every array that `encode` returns is blended, such as the log-variance.
  """
  factor = autoencoder.config.factor
  return _tiled(autoencoder.encode, images, tile, overlap, (factor, 1))


def decode_tiled(autoencoder: Any, z: Latents, *, tile: int = 64, overlap: int = 16) -> Images:
  """autoencoder.decode(z) from overlapping tiles; `tile` and `overlap` are in latent cells.

  Tiles start every `tile - overlap` cells and end with the image. Where two overlap, the result
  goes linearly from one to the other, as in diffusers' `enable_tiling` (there the overlap is a
  quarter of the tile). Norms and attention see one tile only, so that colours may differ a little
  from those of the image decoded whole. Tiles at the right and bottom edges are smaller, and each
  shape of tile is compiled once: at most nine. UserError where 2 overlap > tile.
  """
  return _tiled(autoencoder.decode, z, tile, overlap, (1, autoencoder.config.factor))


def _sliced(function: Callable, x: jax.Array, at_once: int) -> Any:
  require(at_once > 0, f'at_once must be positive, not {at_once}.')
  x, b = jnp.asarray(x), x.shape[0]
  if b <= at_once:
    return function(x)
  parts = -(-b // at_once)
  # Repeating the last row fills up the last part and changes no other.
  rows = jnp.minimum(jnp.arange(parts * at_once), b - 1).reshape(parts, at_once)
  out = lax.map(lambda part: function(x[part]), rows)
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:b], out)


def _tiled(
  function: Callable, x: jax.Array, tile: int, overlap: int, factors: tuple[int, int]
) -> Any:
  """`factors`: the size of a latent cell in the input and in the output."""
  require(0 <= 2 * overlap <= tile and tile > 0,
          f'overlap={overlap} must be at least 0 and at most half of tile={tile}.')
  x = jnp.asarray(x)
  size, step = tile * factors[0], (tile - overlap) * factors[0]
  if max(x.shape[1:3]) <= size:
    return function(x)
  starts = [
    (i, j) for i in range(0, x.shape[1], step) for j in range(0, x.shape[2], step)
  ]
  done = _each_tile(function, x, starts, size)
  leaves, structure = zip(*(jax.tree.flatten(done[start]) for start in starts), strict=True)
  tiles = [dict(zip(starts, arrays, strict=True)) for arrays in zip(*leaves, strict=True)]
  keep, blend = ((n * factors[1]) for n in (tile - overlap, overlap))
  return jax.tree.unflatten(structure[0], [_blend(t, step, keep, blend) for t in tiles])


def _each_tile(function: Callable, x: jax.Array, starts: list[tuple[int, int]], size: int) -> dict:
  """{start: function(tile)}; tiles of one shape go through one compiled loop."""
  shape = lambda i, j: (min(size, x.shape[1] - i), min(size, x.shape[2] - j))
  groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
  for start in starts:
    groups.setdefault(shape(*start), []).append(start)
  done = {}
  for (h, w), members in groups.items():
    cut = lambda at: lax.dynamic_slice(
      x, (0, at[0], at[1], 0), (x.shape[0], h, w, x.shape[3])  # noqa: B023
    )
    out = lax.map(lambda at: function(cut(at)), jnp.array(members))  # noqa: B023
    for n, start in enumerate(members):
      done[start] = jax.tree.map(lambda y: y[n], out)  # noqa: B023
  return done


def _blend(tiles: dict[tuple[int, int], jax.Array], step: int, keep: int, blend: int) -> jax.Array:
  """Joins tiles of which each shows its first `keep` rows and columns.

  A tile's first `blend` rows and columns go over from the finished tiles above and to the left.
  """
  finished: dict[tuple[int, int], jax.Array] = {}
  rows: dict[int, list[jax.Array]] = {}
  for (i, j), tile in tiles.items():
    if i > 0:
      tile = _fade(finished[i - step, j], tile, blend, axis=1)
    if j > 0:
      tile = _fade(finished[i, j - step], tile, blend, axis=2)
    finished[i, j] = tile
    rows.setdefault(i, []).append(tile[:, :keep, :keep])
  return jnp.concatenate([jnp.concatenate(row, axis=2) for row in rows.values()], axis=1)


def _fade(before: jax.Array, after: jax.Array, length: int, axis: int) -> jax.Array:
  """`after` with its first `length` entries along `axis` faded in over the last of `before`."""
  length = min(length, before.shape[axis], after.shape[axis])
  old = lax.slice_in_dim(before, before.shape[axis] - length, None, axis=axis)
  new = lax.slice_in_dim(after, 0, length, axis=axis)
  rest = lax.slice_in_dim(after, length, None, axis=axis)
  weight = (jnp.arange(length, dtype=jnp.float32) / max(length, 1)).astype(after.dtype)
  weight = jnp.expand_dims(weight, [n for n in range(after.ndim) if n != axis])
  return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)
