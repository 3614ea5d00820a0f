"""Losses of all pairs of images and texts of a global batch, whose matrix is nowhere whole.

Each device keeps its images, and the texts go round all devices in a ring, those of one device at a
time, a chunk of them at once. What is summed over a text's column travels with it and has come home
after one round. Gradients take a second round instead of memory, so that no device ever holds more
logits than those of its own images and one chunk. Values and gradients are the same on any number
of devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from diffusion_jax.models.text.clip import unit
from diffusion_jax.parallel.layout import EXAMPLES, mesh_sizes
from diffusion_jax.types import PerExample

CHUNK = 1024
"""Texts that all images of a device are compared with at once."""

Embeddings = jax.Array
"""[b p], float32."""


class Sums(NamedTuple):
  """A sum over a row or a column of logits, of parts in any order.

  start: of no logits. over: (logits, axis) -> sums. join: of two parts. slope: (logits, whole sums
  along them) -> derivatives of the sums by the logits.
  """

  start: float
  over: Callable[[jax.Array, int], jax.Array]
  join: Callable[[jax.Array, jax.Array], jax.Array]
  slope: Callable[[jax.Array, jax.Array], jax.Array]


SUMS = {
  'softmax': Sums(
    -math.inf, lambda z, axis: jax.nn.logsumexp(z, axis=axis), jnp.logaddexp,
    lambda z, total: jnp.exp(z - total),
  ),
  'sigmoid': Sums(
    0.0, lambda z, axis: jax.nn.softplus(z).sum(axis=axis), jnp.add,
    lambda z, total: jax.nn.sigmoid(z),
  ),
}


def contrastive_loss(
  images: Embeddings, texts: Embeddings, logit_scale: jax.Array, label_smoothing: float = 0.0,
  chunk: int = CHUNK,
) -> tuple[PerExample, jax.Array]:
  """(loss [b], fraction of images nearest to their own caption []) of the global batch.

  Symmetric cross-entropy over all pairs (Radford et al. 2021, figure 3), logits in float32. images,
  texts: [b p] embeddings of any length, in pairs. logit_scale: ln(1 / temperature).
  label_smoothing: fraction of each target that is spread over the whole batch.
  """
  images, texts, scale = unit(images), unit(texts), jnp.exp(logit_scale)
  rows, columns, nearest = pair_sums('softmax', chunk, images, texts, scale, jnp.zeros_like(scale))
  own = scale * (images * texts).sum(axis=-1)
  # The mean of a row of logits is the logit of the mean text.
  means = scale * (images @ texts.mean(axis=0) + texts @ images.mean(axis=0)) / 2
  loss = (rows + columns) / 2 - (1 - label_smoothing) * own - label_smoothing * means
  return loss, _accuracy(nearest)


def sigmoid_loss(
  images: Embeddings, texts: Embeddings, logit_scale: jax.Array, logit_bias: jax.Array,
  chunk: int = CHUNK,
) -> tuple[PerExample, jax.Array]:
  """The same of SigLIP: each pair is a question of its own (Zhai et al. 2023, section 3.2).

  Its mean is -1/b sum_ij log sigmoid(+-(exp(logit_scale) x_i y_j + logit_bias)), + for i = j.
  """
  images, texts, scale = unit(images), unit(texts), jnp.exp(logit_scale)
  rows, columns, nearest = pair_sums('sigmoid', chunk, images, texts, scale, logit_bias)
  own = scale * (images * texts).sum(axis=-1) + logit_bias
  # -log sigmoid(z) = softplus(z) - z, and -log sigmoid(-z) = softplus(z).
  return (rows + columns) / 2 - own, _accuracy(nearest)


def _accuracy(nearest: jax.Array) -> jax.Array:
  return (nearest == jnp.arange(len(nearest))).mean()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pair_sums(
  kind: str, chunk: int, images: Embeddings, texts: Embeddings, scale: jax.Array, bias: jax.Array
) -> tuple[PerExample, PerExample, jax.Array]:
  """(sums over each image's row, over each text's column, number of each image's best text), [b].

  Of the logits scale * images @ texts.T + bias [b b], summed as SUMS[kind]; without a mesh in force
  on one device.
  """
  return _forward(kind, chunk, images, texts, scale, bias)[0]


def _forward(kind, chunk, images, texts, scale, bias):
  """The sums, and what their gradients need."""
  sums, axes = SUMS[kind], _ring_axes(len(images))

  def local(images, texts, scale, bias):
    def visit(home, guests, first):
      total, best, nearest = home
      texts, columns = guests
      logits = scale * images @ texts.T + bias
      highest, place = logits.max(axis=1), first + logits.argmax(axis=1)
      better = (highest > best) | ((highest == best) & (place < nearest))
      total = sums.join(total, sums.over(logits, 1))
      home = total, jnp.where(better, highest, best), jnp.where(better, place, nearest)
      return home, (texts, sums.join(columns, sums.over(logits, 0)))

    start = jnp.full(len(images), sums.start, images.dtype)
    home = start, jnp.full_like(start, -math.inf), jnp.zeros(len(images), jnp.int32)
    (rows, _, nearest), (_, columns) = _around(visit, home, (texts, start), axes, chunk)
    return rows, columns, nearest

  out = _on_ring(local, axes, 2)(images, texts, scale, bias)
  return out, (images, texts, scale, bias, *out[:2])


def _backward(kind, chunk, kept, cotangents):
  """Return the gradients by images, texts, scale and bias."""
  images, texts, scale, bias, rows, columns = kept
  sums, axes = SUMS[kind], _ring_axes(len(images))

  def local(images, rows, by_row, texts, columns, by_column, scale, bias):
    def visit(home, guests, first):
      del first
      of_images, of_scale, of_bias = home
      texts, columns, by_column, of_texts = guests
      cosines = images @ texts.T
      logits = scale * cosines + bias
      slopes = by_row[:, None] * sums.slope(logits, rows[:, None])
      slopes += by_column * sums.slope(logits, columns)
      home = of_images + slopes @ texts, of_scale + (slopes * cosines).sum(), of_bias + slopes.sum()
      return home, (texts, columns, by_column, of_texts + slopes.T @ images)

    zero = jnp.zeros((), images.dtype)
    (of_images, of_scale, of_bias), (*_, of_texts) = _around(
      visit, (jnp.zeros_like(images), zero, zero),
      (texts, columns, by_column, jnp.zeros_like(texts)), axes, chunk,
    )
    if axes:
      of_scale, of_bias = lax.psum((of_scale, of_bias), axes)
    return scale * of_images, scale * of_texts, of_scale, of_bias

  by_row, by_column, _ = cotangents
  return _on_ring(local, axes, 6, scalars_out=2)(
    images, rows, by_row, texts, columns, by_column, scale, bias
  )


pair_sums.defvjp(_forward, _backward)

Tree = Any
Visit = Callable[[Tree, Tree, jax.Array], tuple[Tree, Tree]]
"""(what stays, a chunk of the guests, the number of the first of them) -> both afterwards."""


def _around(
  visit: Visit, home: Tree, guests: Tree, axes: Sequence[str], chunk: int
) -> tuple[Tree, Tree]:
  """Let the guests [n ...] of each device visit all devices, and come home."""
  n, sizes = len(jax.tree.leaves(guests)[0]), mesh_sizes()
  if not axes:
    return _in_chunks(visit, home, guests, jnp.zeros((), jnp.int32), chunk)
  ways, own = math.prod(sizes[axis] for axis in axes), lax.axis_index(axes)
  to_next = [(device, (device + 1) % ways) for device in range(ways)]

  def step(carry, moves):
    home, guests = _in_chunks(visit, *carry, (own - moves) % ways * n, chunk)
    return (home, jax.tree.map(lambda x: lax.ppermute(x, axes, to_next), guests)), None

  return lax.scan(step, (home, guests), jnp.arange(ways))[0]


def _in_chunks(
  visit: Visit, home: Tree, guests: Tree, first: jax.Array, chunk: int
) -> tuple[Tree, Tree]:
  """Let the guests [n ...] visit, `chunk` at a time; the last may be fewer."""
  count, rest = divmod(len(jax.tree.leaves(guests)[0]), chunk)
  whole = count * chunk
  if count + bool(rest) == 1:
    return visit(home, guests, first)
  parts = jax.tree.map(lambda x: x[:whole].reshape(count, chunk, *x.shape[1:]), guests)
  home, parts = lax.scan(
    lambda home, part: visit(home, *part), home, (parts, first + chunk * jnp.arange(count))
  )
  done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), parts)
  if rest:
    home, last = visit(home, jax.tree.map(lambda x: x[whole:], guests), first + whole)
    done = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done, last)
  return home, done


def _ring_axes(batch_size: int) -> tuple[str, ...]:
  """Return the axes of the mesh in force that split a batch of that size, none where it is whole.
  """
  sizes = mesh_sizes()
  axes = tuple(axis for axis in EXAMPLES if sizes.get(axis, 1) > 1)
  return axes if batch_size % math.prod(sizes[axis] for axis in axes) == 0 else ()


def _on_ring(local: Callable, axes: Sequence[str], arrays: int, scalars_out: int = 0) -> Callable:
  """Return a function of so many arrays [b ...], then scalars, which devices compute together."""
  if not axes:
    return local
  split, whole = PartitionSpec(axes), PartitionSpec()
  every = {axis for axis, size in mesh_sizes().items() if size > 1}

  def call(*args):
    specs = tuple(split if place < arrays else whole for place in range(len(args)))
    outs = (split, split, *([whole] * scalars_out or [split]))
    return jax.shard_map(
      local, in_specs=specs, out_specs=outs, axis_names=every, check_vma=False
    )(*args)

  return call
