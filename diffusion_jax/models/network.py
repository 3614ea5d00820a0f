"""What the backward pass computes again instead of keeping it (Chen et al. 2016).

A block is a residual block, a transformer block or one of the few layers between such. A network
whose class is a `Blocks` runs its blocks by `run`, and all of itself by `run_all`; what
they then do is said by `remat`, which `Network.of` sets.

Between Flax NNX modules and plain functions of parameters named by dotted path.

Everything outside `models` sees a network as (graphdef, params): params is one flat dictionary such
as {'down_blocks.0.resnets.1.conv1.kernel': array}. Names therefore serve, unchanged, as keys for
sharding rules, optimizer groups, checkpoints and conversion tables.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.models.checks import require
from diffusion_jax.types import Params

REMAT = ('none', 'block', 'offload')
"""none: all results are kept. block: only those of blocks, each of which is computed again.
offload: those, too, wait for the backward pass in the host's memory."""

RESULT = 'block'


@partial(jax.jit, static_argnums=0)
def _once(graphdef: Any, state: Any, *args) -> Any:
  return nnx.merge(graphdef, state)(*args)


class Blocks(nnx.Module):
  """A module that has blocks. `remat` is one of REMAT."""

  remat = 'none'

  def run(self, call: Callable[..., Any], *args) -> Any:
    """call(*args), of which the backward pass finds the arguments alone.

    A module that is like another, with arguments like those of the other, is traced once.
    """
    if isinstance(call, nnx.Module):
      graphdef, state = nnx.split(call)
      call, args = partial(_once, graphdef), (state, *args)
    if self.remat == 'none':
      return call(*args)
    result = jax.checkpoint(lambda *args: call(*args))(*args)
    return jax.tree.map(lambda y: checkpoint_name(y, RESULT), result)

  def run_all(self, call: Callable[..., Any], *args) -> Any:
    """call(*args), in which `run` is used; results of blocks move to the host if so wished."""
    if self.remat != 'offload':
      return call(*args)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[RESULT],
      offload_src='device', offload_dst='pinned_host',
    )
    # The blocks within keep XLA from merging both computations of anything that is large.
    return jax.checkpoint(lambda *args: call(*args), policy=policy, prevent_cse=False)(*args)


def split(module: nnx.Module) -> tuple[Any, Params]:
  """Splits a module into its static graph and its parameters by dotted name."""
  graphdef, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  return graphdef, {'.'.join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge(graphdef: Any, params: Params) -> nnx.Module:
  """Inverse of `split`: a module that computes with `params`."""
  flat = {}
  for name, value in params.items():
    path = tuple(int(part) if part.isdecimal() else part for part in name.split('.'))
    flat[path] = nnx.Param(value)
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


class Keys:
  """One key after another: the keys of nnx.Rngs(key), counted outside of what jax traces.

  nnx.Rngs counts in an array. While a module is traced, each count is a search through all that
  was traced before: two minutes for Stable Diffusion XL's U-Net, which this builds in seconds.
  The keys are derived in blocks, since each derivation on its own is a loop for XLA to compile.
  """

  BLOCK = 64

  def __init__(self, key: jax.Array):
    self.key, self.count, self.block = key, 0, ()

  def params(self) -> jax.Array:
    place = self.count % self.BLOCK
    if place == 0:
      numbers = jnp.arange(self.count, self.count + self.BLOCK)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, numbers)
      self.block = jnp.unstack(jax.random.key_data(keys))
    self.count += 1
    return jax.random.wrap_key_data(self.block[place], impl=jax.random.key_impl(self.key))


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Params]:
  """(graphdef, parameter shapes) of the module that `make` builds, without building it."""
  return split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))


def initialize(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
  """Fresh parameters. Pure, so it can be jitted with sharded outputs."""
  return split(make(Keys(key)))[1]


_initialize_once = jax.jit(initialize, static_argnums=0)


def count(params: Params) -> int:
  """Number of scalar parameters."""
  return sum(leaf.size for leaf in params.values())


class Network(NamedTuple):
  """A network without weights: its configuration, static graph and parameter shapes.

  options: what it was built with beside the config, such as dtype.
  """

  config: Any
  graphdef: Any
  shapes: Params
  make: Callable[[nnx.Rngs], nnx.Module]
  options: Mapping[str, Any] = MappingProxyType({})

  @classmethod
  def of(
    cls, module: type[nnx.Module], config: Any, remat: str = 'none', attention: str = 'auto',
    products: str = 'plain', **kwargs,
  ) -> 'Network':
    """The network `module(config, **kwargs, rngs=...)`.

    With one each of REMAT, ATTENTION and PRODUCTS.
    """
    make = lambda rngs: module(config, **kwargs, rngs=rngs)
    made = cls(config, *abstract(make), make, kwargs)
    return made.rematerialised(remat).attending(attention).multiplying(products)

  def remade(self, make: Callable[[nnx.Rngs], nnx.Module]) -> 'Network':
    """A network of the same config that is built otherwise."""
    return Network(self.config, *abstract(make), make, self.options)

  def rematerialised(self, remat: str) -> 'Network':
    """The same network, of which the backward pass keeps less (see `models.remat`).

    Raises:
      UserError: no such kind, or a network without blocks.
    """
    return self._with('remat', remat, REMAT, Blocks, 'blocks to compute again')

  def attending(self, attention: str) -> 'Network':
    """The same network, whose attention is computed in that way (see `models.attend_ways`).

    Raises:
      UserError: no such way, or a network without attention that has no mask and no bias.
    """
    from diffusion_jax.models.attention import ATTENTION, Attends

    return self._with('attention', attention, ATTENTION, Attends, 'attention of that kind')

  def multiplying(self, products: str) -> 'Network':
    """The same network, whose dense layers multiply in that way (see `models.float8`).

    Raises:
      UserError: no such way, or a network without dense layers.
    """
    from diffusion_jax.models.kernels import PRODUCTS
    from diffusion_jax.models.layers import Linear

    return self._with('products', products, PRODUCTS, Linear, 'dense layers')

  def _with(
    self, option: str, value: str, known: Sequence[str], kind: type[nnx.Module], parts: str
  ) -> 'Network':
    """The same network, with an attribute of all its parts of that kind set to the value."""
    if value == self.options.get(option, known[0]):
      return self
    require(value in known, f'{option} is {value!r}; choose one of {", ".join(known)}.')

    def change(module: nnx.Module) -> nnx.Module:
      found = [part for _, part in nnx.iter_modules(module) if isinstance(part, kind)]
      name = type(module).__name__
      require(bool(found), f'{name} has no {parts}; set {option} to {known[0]}.')
      for part in found:
        setattr(part, option, value)
      return module

    graphdef = split(change(self.bind(self.shapes)))[0]
    options = {**self.options, option: value}
    return self._replace(
      graphdef=graphdef, make=lambda rngs: change(self.make(rngs)), options=options
    )

  def bind(self, params: Params) -> nnx.Module:
    """A module that computes with `params`."""
    return merge(self.graphdef, params)

  def initialize(self, key: jax.Array) -> Params:
    """Fresh parameters."""
    # Both the shapes of a state and the program that begins it are traced from this.
    once = isinstance(key, jax.core.Tracer)
    return (_initialize_once if once else initialize)(self.make, key)


def prefixed(prefix: str, params: Params) -> Params:
  """Adds 'prefix.' to every name, so that several networks fit into one dictionary."""
  return {f'{prefix}.{name}': value for name, value in params.items()}


def under(prefix: str, params: Params) -> Params:
  """The entries whose names start with 'prefix.', without it."""
  start = f'{prefix}.'
  return {n.removeprefix(start): value for n, value in params.items() if n.startswith(start)}
