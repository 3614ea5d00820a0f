"""Networks as plain functions of parameters by dotted name, and how they compute.

Outside of `models` a Flax NNX module is (graphdef, params), params a flat dictionary such as
{'down_blocks.0.resnets.1.conv1.kernel': array}, whose names are keys for sharding rules, optimizer
groups, checkpoints and conversion tables. Every module is made by
`Module(..., compute=Compute(...), rngs=...)` and passes both to its parts.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var
from jax.typing import DTypeLike

from diffusion_jax.errors import UserError, require
from diffusion_jax.registry import check
from diffusion_jax.types import Params

REMAT = ('none', 'block', 'offload')
"""Rematerialisation (Chen et al. 2016). none: all results are kept for the backward pass. block:
only those of blocks. offload: those wait in the host's memory."""

ATTENTION = ('auto', 'xla', 'cudnn', 'splash', 'chunked')
"""How attention is computed, see `models.attention`; auto: as suits device and lengths."""

MATMUL_PRECISION = ('plain', 'float8')
"""Of dense layers over tokens, forward and backward. plain: the network's own type, in which layers
over whole images, such as of the time, always are."""

TILING = ('none', 'x', 'y', 'both')
"""Axes along which convolutions wrap around, x across and y down, so that what is drawn continues
beyond its opposite edge."""

RESULT = 'block'


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a network computes, whatever its shape.

  dtype: of the computation; norms and softmax are always float32. param_dtype: of new parameters.
  remat, attention, matmul_precision and tiling: one each of the tables above. perturbed: prefix of
  a module's name, such as 'mid_block', within which self-attention is the identity (Ahn et al.
  2024); '' for none.
  """

  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: str = 'none'
  attention: str = 'auto'
  matmul_precision: str = 'plain'
  perturbed: str = ''
  tiling: str = 'none'

  def __post_init__(self):
    for name, known in (
      ('remat', REMAT), ('attention', ATTENTION), ('matmul_precision', MATMUL_PRECISION),
      ('tiling', TILING),
    ):
      check(known, getattr(self, name), name)


PLAIN = Compute()

NEEDS = {
  'remat': 'blocks to compute again', 'attention': 'attention of that kind',
  'matmul_precision': 'dense layers', 'tiling': 'convolutions beyond edges',
}
"""Options of Compute that only some modules heed, and what those are. Their classes say so by
`heeds`."""


@partial(jax.jit, static_argnums=0)
def _once(graphdef: Any, state: Any, *args) -> Any:
  return nnx.merge(graphdef, state)(*args)


class Blocks(nnx.Module):
  """A module that runs its parts by `run`, and all of itself by `run_all`, so that remat works."""

  heeds = 'remat'

  def __init__(self, *, compute: Compute = PLAIN, rngs: Any = None):
    del rngs
    self.remat = compute.remat

  def run(self, call: Callable[..., Any], *args) -> Any:
    """call(*args); with remat only its arguments are kept for the backward pass.

    Equal modules with equal arguments are traced once.
    """
    if isinstance(call, nnx.Module):
      graphdef, state = nnx.split(call)
      call, args = partial(_once, graphdef), (state, *args)
    if self.remat == 'none':
      return call(*args)
    result = jax.checkpoint(lambda *args: call(*args))(*args)
    return jax.tree.map(lambda y: checkpoint_name(y, RESULT), result)

  def run_all(self, call: Callable[..., Any], *args) -> Any:
    """Return call(*args), in which `run` is used; offload moves its results to the host."""
    if self.remat != 'offload':
      return call(*args)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[], names_which_can_be_offloaded=[RESULT],
      offload_src='device', offload_dst='pinned_host',
    )
    # The blocks within keep XLA from merging both computations of anything that is large.
    return jax.checkpoint(lambda *args: call(*args), policy=policy, prevent_cse=False)(*args)


def split(module: nnx.Module) -> tuple[Any, Params]:
  """Return a module's static graph and its parameters by dotted name."""
  graphdef, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  return graphdef, {'.'.join(map(str, path)): leaf.get_value() for path, leaf in flat}


def merge(graphdef: Any, params: Params) -> nnx.Module:
  """Invert `split`: return a module that computes with `params`."""
  flat = {}
  for name, value in params.items():
    path = tuple(int(part) if part.isdecimal() else part for part in name.split('.'))
    flat[path] = nnx.Param(value)
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


class Keys:
  """One key after another: the keys of nnx.Rngs(key), counted outside of what jax traces.

  nnx.Rngs counts in an array, searched for while tracing: two minutes for Stable Diffusion XL's
  U-Net, here seconds. Keys are derived in blocks, since each derivation compiles a loop.
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


Make = Callable[[Any], nnx.Module]
"""From nnx.Rngs, or Keys, to a module."""


def abstract(make: Make) -> tuple[Any, Params]:
  """Return (graphdef, parameter shapes) of the module that `make` builds, without building it."""
  return split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))


def initialize(make: Make, key: jax.Array) -> Params:
  """Return fresh parameters. Pure, so it can be jitted with sharded outputs."""
  return split(make(Keys(key)))[1]


_initialize_once = jax.jit(initialize, static_argnums=0)


def count(params: Params) -> int:
  """Return the number of scalar parameters."""
  return sum(leaf.size for leaf in params.values())


class Network(NamedTuple):
  """A network without weights: its configuration, static graph, parameter shapes and Compute.

  build: makes the module for a Compute, so that the same network can compute otherwise.
  """

  config: Any
  graphdef: Any
  shapes: Params
  make: Make
  build: Callable[[Compute], Make]
  compute: Compute = PLAIN

  @classmethod
  def of(
    cls, module: type[nnx.Module], config: Any, compute: Compute = PLAIN, **changes
  ) -> 'Network':
    """The network `module(config, compute=..., rngs=...)`; `changes` are to fields of the Compute.

    Equal ones are traced once, and share their shapes, which are not to be changed. UserError for
    settings without effect, such as a kind of attention where there is none.
    """
    given = (module, config, dataclasses.replace(compute, **changes))
    try:
      hash(given)
    except TypeError:  # A config with a list, say.
      return _network(*given)
    # As text too: 1, 1.0 and True are equal, but not written alike.
    return _network_once(*given, repr(config), jax.config.jax_enable_x64)

  @classmethod
  def built(cls, config: Any, build: Callable[[Compute], Make], compute: Compute) -> 'Network':
    """Return the network that `build` makes."""
    plain = build(compute)
    make = (lambda rngs: _perturb(plain(rngs), compute.perturbed)) if compute.perturbed else plain
    module = nnx.eval_shape(lambda: make(Keys(jax.random.key(0))))
    for option, parts in NEEDS.items():
      default = getattr(PLAIN, option)
      heeded = getattr(compute, option) == default or any(
        getattr(part, 'heeds', None) == option for _, part in nnx.iter_modules(module)
      )
      name = type(module).__name__
      require(heeded, f'{name} has no {parts}; set {option} to {default}.')
    return cls(config, *split(module), make, build, compute)

  def with_compute(self, **changes) -> 'Network':
    """Return the same network with changes to its Compute."""
    compute = dataclasses.replace(self.compute, **changes)
    return self if compute == self.compute else self.built(self.config, self.build, compute)

  def bind(self, params: Params) -> nnx.Module:
    """Return a module that computes with `params`."""
    return merge(self.graphdef, params)

  def initialize(self, key: jax.Array) -> Params:
    """Return fresh parameters."""
    # Both the shapes of a state and the program that begins it are traced from this.
    once = isinstance(key, jax.core.Tracer)
    return (_initialize_once if once else initialize)(self.make, key)


def _network(
  module: type[nnx.Module], config: Any, compute: Compute, *others: Any
) -> Network:
  """The network `module(config, compute=..., rngs=...)`. others: what else it may depend on."""
  del others

  def build(compute: Compute) -> Make:
    return lambda rngs: module(config, compute=compute, rngs=rngs)

  return Network.built(config, build, compute)


# Commands make the same few networks again and again, and tracing one takes up to seconds.
_network_once = lru_cache(maxsize=32)(_network)


def _perturb(module: nnx.Module, part: str) -> nnx.Module:
  wanted = part.split('.')
  within = lambda path, _: [*map(str, path)][: len(wanted)] == wanted
  try:
    module.set_attributes(within, perturbed=True)
  except ValueError as error:
    name = type(module).__name__
    raise UserError(f'there is no self-attention in {part!r} of {name}.') from error
  return module


def used_names(function: Callable[[Params], Any], params: Params) -> tuple[str, ...]:
  """Return the names of the parameters, arrays or shapes, that the result of a function depends on.

  A call within is one operation, which depends on all of its arguments.
  """
  names = sorted(params)  # The order of a dict's leaves.
  jaxpr = jax.make_jaxpr(function)({name: params[name] for name in names}).jaxpr
  variables = lambda values: {value for value in values if isinstance(value, Var)}
  needed = variables(jaxpr.outvars)
  for step in reversed(jaxpr.eqns):
    if needed & set(step.outvars):
      needed |= variables(step.invars)
  return tuple(
    name for name, value in zip(names, jaxpr.invars, strict=True) if value in needed
  )


def prefixed(prefix: str, params: Params) -> Params:
  """Return the parameters with 'prefix.' before every name; several networks fit into one."""
  return {f'{prefix}.{name}': value for name, value in params.items()}


def under(prefix: str, params: Params) -> Params:
  """Return the entries whose names start with 'prefix.', without it."""
  start = f'{prefix}.'
  return {n.removeprefix(start): value for n, value in params.items() if n.startswith(start)}
