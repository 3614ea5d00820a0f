"""Moments of any optimizer in bfloat16 or in 8 bits, block by block, between its updates.

The optimizer itself computes in float32. What is stored is rounded at random, to either neighbour
with the probability that makes the mean right: a second moment moves by a thousandth of itself in a
step, which rounding to the nearest would lose again and again. The random numbers are a function of
the count of updates, so a resumed run goes on to the bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.errors import UserError
from diffusion_jax.types import Params

SIGNED = {
  'mu': True, 'trace': True, 'ema': True, 'exp_avg': True, 'grad_sum': True,
  'nu': False, 'exp_avg_sq': False,
}
"""Fields of optimizer states that are moments; False for those that are never negative."""
BLOCK = 256
"""Numbers with a scale of their own, at most."""
SMALLEST = 4096
"""Numbers of a parameter whose moments are stored in 8 bits; of smaller ones they are float32."""


class Blocks(NamedTuple):
  """A moment in 8 bits.

  codes: uint8, of the parameter's shape, so they are split over a mesh as it is. scales: float32,
  the largest absolute value of each block; of the same rank, with blocks in place of one axis.
  """

  codes: jax.Array
  scales: jax.Array


class Layout(NamedTuple):
  """Blocks of an array: `width` numbers one after another on an axis, the last maybe fewer."""

  axis: int
  count: int
  width: int

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> 'Layout':
    """The fewest equal blocks of the last axis, or where that is short, of the longest one."""
    axis = len(shape) - 1
    if shape[axis] < BLOCK:
      axis = max(range(len(shape)), key=lambda i: (shape[i], i))
    count = -(-shape[axis] // BLOCK)
    return cls(axis, count, -(-shape[axis] // count))

  def split(self, x: jax.Array) -> jax.Array:
    """[... n ...] -> [... count width ...], with zeros at the end."""
    missing = self.count * self.width - x.shape[self.axis]
    if missing:
      x = jnp.pad(x, [(0, missing * (i == self.axis)) for i in range(x.ndim)])
    return x.reshape(*x.shape[: self.axis], self.count, self.width, *x.shape[self.axis + 1 :])

  def join(self, x: jax.Array, length: int) -> jax.Array:
    """[... count width ...] -> [... length ...]."""
    x = x.reshape(*x.shape[: self.axis], self.count * self.width, *x.shape[self.axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=self.axis)


def dynamic_code(signed: bool) -> np.ndarray:
  """The 256 values of dynamic 8-bit numbers, ascending (Dettmers et al. 2022, section 1.3).

  The decade from 10^(e - 1) to 10^e, e = -6 ... 0, is cut into 2^(e + 6) equal parts, or twice as
  many without a sign, whose middles are values; so are 0 and 1.
  """
  values = [np.array([0.0, 1.0])]
  for e in range(-6, 1):
    edges = np.linspace(0.1, 1, 2 ** (e + 6 + (not signed)) + 1)
    middles = 10.0**e * (edges[:-1] + edges[1:]) / 2
    values += [middles, -middles] if signed else [middles]
  return np.sort(np.concatenate(values)).astype(np.float32)


def linear_code(signed: bool) -> np.ndarray:
  """Values in equal steps, ascending: -1 to 1, or the squares of 1/256 to 1.

  Of a second moment it is the root that an update is divided by, and it must not become zero (Li et
  al. 2023, section 4.1).
  """
  values = np.arange(-127, 128) / 127 if signed else (np.arange(1, 257) / 256) ** 2
  return values.astype(np.float32)


CODES = {'int8_dynamic': dynamic_code, 'int8_linear': linear_code}


class Code(NamedTuple):
  """A code of `CODES` by name, for numbers with a sign or without."""

  name: str
  signed: bool

  @property
  def values(self) -> np.ndarray:
    """Return its values in units of a block's scale, ascending."""
    return CODES[self.name](self.signed)

  def below(self, x: jax.Array) -> jax.Array:
    """Index of the largest value up to x, by arithmetic where steps are equal; int32."""
    values = self.values
    if self.name == 'int8_linear':
      index = jnp.floor((x + 1) * 127) if self.signed else jnp.floor(jnp.sqrt(x) * 256) - 1
      return jnp.clip(index, 0, len(values) - 2).astype(jnp.int32)
    index = jnp.searchsorted(jnp.asarray(values), x, side='right', method='scan_unrolled') - 1
    return jnp.clip(index, 0, len(values) - 2)

  def at(self, index: jax.Array) -> jax.Array:
    """Return the value of an index."""
    if self.name != 'int8_linear':
      return jnp.asarray(self.values)[index]
    real = index.astype(jnp.float32)
    return (real - 127) / 127 if self.signed else jnp.square((real + 1) / 256)

  def encode(self, x: jax.Array, noise: jax.Array) -> Blocks:
    """x, float32, in 8 bits; noise: in [0, 1), of x's shape; 0.5 rounds to the nearest."""
    layout = Layout.of(x.shape)
    parts = layout.split(x)
    scales = jnp.abs(parts).max(layout.axis + 1, keepdims=True)
    unit = parts / jnp.where(scales > 0, scales, 1.0)
    if not self.signed and self.name == 'int8_dynamic':
      # What has ever had a gradient is divided by more than nothing.
      unit = jnp.where(unit > 0, jnp.maximum(unit, float(self.values[1])), 0.0)
    low = self.below(unit)
    first, second = self.at(low), self.at(low + 1)
    codes = low + (layout.split(noise) < (unit - first) / (second - first))
    codes = layout.join(codes.astype(jnp.uint8), x.shape[layout.axis])
    return Blocks(codes, scales.squeeze(layout.axis + 1))

  def decode(self, blocks: Blocks) -> jax.Array:
    """Return the numbers, float32."""
    layout, shape = Layout.of(blocks.codes.shape), blocks.codes.shape
    unit = self.at(layout.split(blocks.codes.astype(jnp.int32)))
    values = unit * jnp.expand_dims(blocks.scales, layout.axis + 1)
    return layout.join(values, shape[layout.axis])


def noise_like(x: jax.Array, seed: jax.Array) -> jax.Array:
  """Numbers in [0, 1), float32, of x's shape: a hash of the place and the seed, uint32.

  Far cheaper than JAX's generator, and the same however the array is split over devices.
  """
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, length in enumerate(x.shape):
    place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return (_mixed(place + _mixed(seed)) >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(x: jax.Array) -> jax.Array:
  """Each bit depends on each (the finaliser of MurmurHash3, by Appleby)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def to_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
  """x, float32, rounded to a neighbour in bfloat16 by noise in [0, 1)."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = (bits + (noise * 2.0**16).astype(jnp.uint32)) & np.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


class Stored(NamedTuple):
  """count: updates made. state: the optimizer's, whose moments are `Blocks` or bfloat16."""

  count: jax.Array
  state: Any


def stored(
  made: optax.GradientTransformationExtraArgs, moments: str, name: str
) -> optax.GradientTransformationExtraArgs:
  """The optimizer with its moments as `config.optimizer.moments` says, not 'float32'."""

  def packed(state: Any, count: jax.Array) -> Any:
    def one(path: Any, x: jax.Array) -> Any:
      number[0] += 1
      if not is_moment(path, x) or (moments != 'bfloat16' and x.size < SMALLEST):
        return x
      seed = count.astype(jnp.uint32) * np.uint32(0x9E3779B9) + np.uint32(number[0])
      noise = noise_like(x, seed)
      if moments == 'bfloat16':
        return to_bfloat16(x, noise)
      return Code(moments, SIGNED[_field(path)]).encode(x, noise)

    number = [0]
    return jax.tree_util.tree_map_with_path(one, state)

  def unpacked(state: Any) -> Any:
    def one(path: Any, x: Any) -> Any:
      if isinstance(x, Blocks):
        return Code(moments, SIGNED[_field(path)]).decode(x)
      return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 and is_moment(path, x) else x

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Blocks))

  def init(params: Params) -> Stored:
    state, count = made.init(params), jnp.zeros((), jnp.int32)
    if not any(is_moment(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)):
      raise UserError(
        f'optimizer.moments is {moments!r}, but {name} with these options keeps no moments of '
        "single parameters; set it to 'float32'."
      )
    return Stored(count, packed(state, count))

  def update(grads: Params, state: Stored, params: Params, *, use=True, **more):
    updates, after = made.update(grads, unpacked(state.state), params, use=use, **more)
    after = packed(after, state.count + 1)
    # Not rounded again where nothing has changed.
    after = jax.tree.map(lambda a, b: jnp.where(use, a, b), after, state.state)
    return updates, Stored(state.count + use, after)

  return optax.GradientTransformationExtraArgs(init, update)


def _field(path: Any) -> str:
  """The last field of a state that leads to a leaf."""
  keys = (key.name for key in reversed(path) if isinstance(key, jax.tree_util.GetAttrKey))
  return next(keys, '')


def is_moment(path: Any, x: jax.Array) -> bool:
  """Whether a leaf of a state is a moment of a parameter of the same shape."""
  named = any(isinstance(key, jax.tree_util.DictKey) for key in path)
  return named and _field(path) in SIGNED and jnp.issubdtype(x.dtype, jnp.floating)
