"""Between Flax NNX modules and plain functions of parameters named by dotted path.

Everything outside `models` sees a network as (graphdef, params): params is one flat dictionary such
as {'down_blocks.0.resnets.1.conv1.kernel': array}. Names therefore serve, unchanged, as keys for
sharding rules, optimizer groups, checkpoints and conversion tables.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from diffusion_jax.types import Params


def split(module: nnx.Module) -> tuple[Any, Params]:
  """Splits a module into its static graph and its parameters by dotted name."""
  graphdef, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  return graphdef, {'.'.join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge(graphdef: Any, params: Params) -> nnx.Module:
  """Inverse of `split`: a module that computes with `params`."""
  flat = {}
  for name, value in params.items():
    path = tuple(int(part) if part.isdigit() else part for part in name.split('.'))
    flat[path] = nnx.Param(value)
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


class _OneKey:
  """Stands for nnx.Rngs where only shapes matter.

  The counters of nnx.Rngs make tracing quadratic in the number of parameters: 7 s, not 1 s, for
  CLIP's 372 tensors.
  """

  def __init__(self, key: jax.Array):
    self.key = key

  def params(self) -> jax.Array:
    return self.key


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Params]:
  """(graphdef, parameter shapes) of the module that `make` builds, without building it."""
  return split(nnx.eval_shape(lambda: make(_OneKey(jax.random.key(0)))))


def initialize(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
  """Fresh parameters. Pure, so it can be jitted with sharded outputs."""
  return split(make(nnx.Rngs(key)))[1]


def count(params: Params) -> int:
  """Number of scalar parameters."""
  return sum(leaf.size for leaf in params.values())


class Network(NamedTuple):
  """A network without weights: its configuration, static graph and parameter shapes."""

  config: Any
  graphdef: Any
  shapes: Params
  make: Callable[[nnx.Rngs], nnx.Module]

  @classmethod
  def of(cls, module: type[nnx.Module], config: Any, **kwargs) -> 'Network':
    """The network `module(config, **kwargs, rngs=...)`."""
    make = lambda rngs: module(config, **kwargs, rngs=rngs)
    return cls(config, *abstract(make), make)

  def remade(self, make: Callable[[nnx.Rngs], nnx.Module]) -> 'Network':
    """A network of the same config that is built otherwise."""
    return Network(self.config, *abstract(make), make)

  def bind(self, params: Params) -> nnx.Module:
    """A module that computes with `params`."""
    return merge(self.graphdef, params)

  def initialize(self, key: jax.Array) -> Params:
    """Fresh parameters."""
    return initialize(self.make, key)


def prefixed(prefix: str, params: Params) -> Params:
  """Adds 'prefix.' to every name, so that several networks fit into one dictionary."""
  return {f'{prefix}.{name}': value for name, value in params.items()}


def under(prefix: str, params: Params) -> Params:
  """The entries whose names start with 'prefix.', without it."""
  start = f'{prefix}.'
  return {n.removeprefix(start): value for n, value in params.items() if n.startswith(start)}
