"""The Inception v3 of 2015-12-05 by which FID is defined (Szegedy et al. 2016; Heusel et al. 2017).

Unlike other libraries' it has 1008 classes, no auxiliary head, average pools without the padding,
and a maximum where the last block should have an average. Batch norms are folded into the
convolutions (`formats.inception`). Parts are named as in the published files.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from diffusion_jax.backend.cpu import LAYOUT
from diffusion_jax.errors import require
from diffusion_jax.models.config import NetworkConfig, Width
from diffusion_jax.models.layers import Linear

SIZE = 299
"""Height and width of the images that it was trained on."""
SPATIAL_CHANNELS = 7


@dataclasses.dataclass(frozen=True)
class InceptionConfig(NetworkConfig):
  """divisor: of all channels; 1 is the published network, 16 a tiny one.

  precision: of matrix products; below 'highest' is faster on accelerators and changes metrics.
  """

  divisor: Width = 1
  classes: Width = 1008
  precision: str = 'highest'

  def check(self) -> None:
    self.require(16 % self.divisor == 0, 'divisor', 'must be 1, 2, 4, 8 or 16')

  @property
  def widths(self) -> dict[str, int]:
    """Feature -> its width, in the order of the network."""
    d, classes = self.divisor, self.classes
    return {
      '64': 64 // d, '192': 192 // d, 'spatial': 17 * 17 * SPATIAL_CHANNELS, '768': 768 // d,
      'pool3': 2048 // d, 'logits_unbiased': classes, 'logits': classes,
    }


def _pool(x: jax.Array, combine: Callable, stride: int = 1, fill: float | None = None) -> jax.Array:
  """Combine 3x3 windows, axis by axis; `fill` pads the map, which then keeps its size.

  By shifted copies: XLA's reduce_window takes 6 times as long on CPUs.
  """
  for axis in (1, 2):
    if fill is not None:
      x = jnp.pad(x, [(int(axis == a),) * 2 for a in range(4)], constant_values=fill)
    last = (x.shape[axis] - 3) // stride * stride
    shifts = (lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3))
    x = functools.reduce(combine, shifts)
  return x


def _average(x: jax.Array) -> jax.Array:
  """Mean over 3x3 windows without the padding: [b h w c], same shape."""
  counts = _pool(jnp.ones((1, *x.shape[1:3], 1), x.dtype), jnp.add, fill=0)
  return _pool(x, jnp.add, fill=0) / counts


POOLS = {
  'average': _average, 'maximum': lambda x: _pool(x, jnp.maximum, fill=-jnp.inf),
  'half': lambda x: _pool(x, jnp.maximum, stride=2),
}


class Step(NamedTuple):
  """A convolution with its rectifier."""

  name: str
  features: int
  window: tuple[int, int]
  stride: int
  same: bool


def _step(text: str) -> Any:
  """The Step, a pool's name, or a fork (a tuple) of a text in the tables below."""
  if ' + ' in text:
    return tuple(map(_step, text.split(' + ')))
  if text in POOLS:
    return text
  name, features, window, how = (*text.split(), 'same')[:4]
  height, width = map(int, window.split('x'))
  return Step(name, int(features), (height, width), 2 if how == '/2' else 1, how == 'same')


def _block(text: str, **values) -> tuple:
  lines = text.format(**values).strip().splitlines()
  return tuple(tuple(map(_step, line.split(', '))) for line in lines)


_A = """
branch1x1 64 1x1
branch5x5_1 48 1x1, branch5x5_2 64 5x5
branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3
average, branch_pool {pool} 1x1
"""
_B = """
branch3x3 384 3x3 /2
branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3 /2
half
"""
_C = """
branch1x1 192 1x1
branch7x7_1 {c} 1x1, branch7x7_2 {c} 1x7, branch7x7_3 192 7x1
branch7x7dbl_1 {c} 1x1, branch7x7dbl_2 {c} 7x1, branch7x7dbl_3 {c} 1x7, \
branch7x7dbl_4 {c} 7x1, branch7x7dbl_5 192 1x7
average, branch_pool 192 1x1
"""
_D = """
branch3x3_1 192 1x1, branch3x3_2 320 3x3 /2
branch7x7x3_1 192 1x1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3 /2
half
"""
_E = """
branch1x1 320 1x1
branch3x3_1 384 1x1, branch3x3_2a 384 1x3 + branch3x3_2b 384 3x1
branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3 + branch3x3dbl_3b 384 3x1
{pool}, branch_pool 192 1x1
"""


(STEM,) = _block(
  'Conv2d_1a_3x3 32 3x3 /2, Conv2d_2a_3x3 32 3x3 valid, Conv2d_2b_3x3 64 3x3, half, '
  'Conv2d_3b_1x1 80 1x1, Conv2d_4a_3x3 192 3x3 valid, half'
)
BLOCKS = {
  'Mixed_5b': _block(_A, pool=32), 'Mixed_5c': _block(_A, pool=64),
  'Mixed_5d': _block(_A, pool=64), 'Mixed_6a': _block(_B),
  'Mixed_6b': _block(_C, c=128), 'Mixed_6c': _block(_C, c=160),
  'Mixed_6d': _block(_C, c=160), 'Mixed_6e': _block(_C, c=192),
  'Mixed_7a': _block(_D), 'Mixed_7b': _block(_E, pool='average'),
  'Mixed_7c': _block(_E, pool='maximum'),
}
"""A line for each branch of a block, whose results are put side by side: what is done in turn. A
convolution is a name, channels, a window, and '/2' for a stride of 2 or 'valid' for no padding."""


class ConvReLU(nnx.Module):
  """A convolution with the batch norm in it, and a rectifier: [b h w i] -> [b h' w' o]."""

  def __init__(self, step: Step, in_features: int, config: InceptionConfig, rngs: nnx.Rngs):
    self.features = step.features // config.divisor
    init = nnx.initializers.he_normal()
    shape = (*step.window, in_features, self.features)
    self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.bias = nnx.Param(jnp.zeros((self.features,), jnp.float32))
    self.stride, self.padding = step.stride, 'SAME' if step.same else 'VALID'
    self.precision = config.precision

  def __call__(self, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
      x, self.kernel[...], (self.stride,) * 2, self.padding, dimension_numbers=LAYOUT,
      precision=self.precision,
    )
    return self.finish(y)

  def finish(self, y: jax.Array) -> jax.Array:
    """Add the bias and rectify."""
    return nnx.relu(y + self.bias[...])


class Mixed(nnx.Module):
  """A block of the table: [b h w i] -> [b h' w' o].

  All 1x1 convolutions of the input are one product. An average, which commutes with such, is taken
  of the result with its fewer channels.
  """

  def __init__(self, branches: tuple, in_features: int, config: InceptionConfig, rngs: nnx.Rngs):
    self.branches, self.precision = branches, config.precision
    self.features = 0
    for branch in branches:
      width = in_features
      for step in branch:
        forks = [s for s in (step if _is_fork(step) else (step,)) if isinstance(s, Step)]
        for part in forks:
          setattr(self, part.name, ConvReLU(part, width, config, rngs))
        width = sum(part.features // config.divisor for part in forks) if forks else width
      self.features += width

  def __call__(self, x: jax.Array) -> jax.Array:
    entries = self._entries(x)
    return jnp.concatenate([self._branch(x, branch, entries) for branch in self.branches], -1)

  def _entries(self, x: jax.Array) -> dict[str, jax.Array]:
    """Products of the 1x1 convolutions of x, by name, before bias and rectifier."""
    steps = [s for s in map(_start, self.branches) if isinstance(s, Step) and s.window == (1, 1)]
    parts = [getattr(self, step.name) for step in steps]
    kernel = jnp.concatenate([part.kernel[0, 0] for part in parts], -1)
    y = jnp.matmul(x, kernel, precision=self.precision)
    ends = [sum(part.features for part in parts[: i + 1]) for i in range(len(parts) - 1)]
    return {step.name: v for step, v in zip(steps, jnp.split(y, ends, -1), strict=True)}

  def _branch(self, x: jax.Array, branch: tuple, entries: dict[str, jax.Array]) -> jax.Array:
    first, averaged = _start(branch), branch[0] == 'average'
    if isinstance(first, Step) and first.name in entries:
      y = entries[first.name]
      x = getattr(self, first.name).finish(_average(y) if averaged else y)
      branch = branch[1 + averaged :]
    return functools.reduce(self._step, branch, x)

  def _step(self, x: jax.Array, step) -> jax.Array:
    if _is_fork(step):
      return jnp.concatenate([getattr(self, part.name)(x) for part in step], -1)
    return getattr(self, step.name)(x) if isinstance(step, Step) else POOLS[step](x)


def _start(branch: tuple):
  """The branch's first step, or the one after a leading average."""
  return branch[1] if branch[0] == 'average' else branch[0]


def _is_fork(step) -> bool:
  return isinstance(step, tuple) and not isinstance(step, Step)


class Inception(nnx.Module):
  """Images -> features by name; the stages after the last one asked for are left out.

  Features, float32:
    '64', '192', '768': means over the map after the first and the second maximum and after
      Mixed_6e; named by the published network's channels.
    'pool3': mean over the last map, 2048 wide; FID is of these.
    'spatial': the first 7 channels of the 17x17 map after Mixed_6d, flattened (h w c), 2023 wide;
      sFID is of these. guided-diffusion's evaluator calls it `mixed_6/conv:0`: its graph counts
      the blocks from 0 (`mixed`, `mixed_1`, ...), so that mixed_6 is Mixed_6d, and conv is the 1x1
      convolution with its rectifier, whose channels come first in the block's result.
    'logits_unbiased': pool3 times the last matrix, without its bias, as the Inception score of
      torch-fidelity and guided-diffusion has them. 'logits': with it.
  """

  def __init__(self, config: InceptionConfig, *, compute: Any = None, rngs: nnx.Rngs):
    del compute  # It computes in float32, as the tools do.
    self.config = config
    width = 3
    for step in STEM:
      if isinstance(step, Step):
        setattr(self, step.name, ConvReLU(step, width, config, rngs))
        width = step.features // config.divisor
    for name, branches in BLOCKS.items():
      setattr(self, name, Mixed(branches, width, config, rngs))
      width = getattr(self, name).features
    self.fc = Linear(width, config.classes, rngs=rngs)

  def __call__(self, x: jax.Array, features: Sequence[str] = ('pool3',)) -> dict[str, jax.Array]:
    """x [b 299 299 3], about [-1, 1] (see `evaluation.resize`) -> {feature: [b d]}, in their order.

    UserError: another size, or an unknown feature.
    """
    require(
      x.shape[1:] == (SIZE, SIZE, 3),
      f'Inception takes images [b {SIZE} {SIZE} 3], not {list(x.shape)}: resize them first.',
    )
    known = self.config.widths
    for name in features:
      require(name in known, f'Inception has no {name!r}; choose of {", ".join(known)}.')
    found: dict[str, jax.Array] = {}
    for name, value in self._features(x):
      found |= {name: value} if name in features else {}
      if len(found) == len(set(features)):
        break
    return {name: found[name] for name in features}

  def _features(self, x: jax.Array):
    """Yield every feature as soon as the network has come to it."""
    names = iter(('64', '192'))
    for step in STEM:
      x = getattr(self, step.name)(x) if isinstance(step, Step) else POOLS[step](x)
      if step == 'half':
        yield next(names), x.mean((1, 2))
    for block in BLOCKS:
      x = getattr(self, block)(x)
      if block == 'Mixed_6d':
        yield 'spatial', x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
      if block == 'Mixed_6e':
        yield '768', x.mean((1, 2))
    x = x.mean((1, 2))
    yield 'pool3', x
    x = jnp.matmul(x, self.fc.kernel[...], precision=self.config.precision)
    yield 'logits_unbiased', x
    yield 'logits', x + self.fc.bias[...]
