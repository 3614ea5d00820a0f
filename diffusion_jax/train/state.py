"""Everything that training changes, as one pytree."""

from collections.abc import Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_jax.parallel.mesh import shard_like, with_shardings
from diffusion_jax.train.guard import Guard
from diffusion_jax.train.tasks.task import Carry, Task
from diffusion_jax.types import Params


class TrainState(NamedTuple):
  """step: updates made so far. key: root of all randomness, never changed; a step's randomness is
  fold_in(key, step). ema: averaged parameters, empty when there is no averaging. carry: what the
  task carries from step to step, often nothing. guard: finds steps that would spoil them."""

  step: jax.Array
  key: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: Params
  carry: Carry
  guard: Guard

  @property
  def eval_params(self) -> Params:
    """Return the parameters that are sampled, scored and exported."""
    return self.ema or self.params


def _initialize(
  task: Task, optimizer, use_ema: bool, seed: int, given: Params | None = None,
  names: Set[str] = frozenset(),
) -> TrainState:
  """Return the state with the given parameters; where some of all `names` lack, they are fresh."""
  init_key, key = jax.random.split(jax.random.key(seed))
  whole = given is not None and names <= given.keys()
  params = given if whole else {**task.initialize(init_key), **(given or {})}
  return TrainState(
    jnp.zeros((), jnp.int32), jax.random.key_data(key), params, optimizer.init(params),
    jax.tree.map(jnp.copy, params) if use_ema else {}, task.carry(), Guard.fresh(),
  )


def abstract_state(task: Task, optimizer, use_ema: bool, mesh: Mesh) -> TrainState:
  """Return shapes, types and shardings of the state; nothing is allocated."""
  shapes = jax.eval_shape(lambda: _initialize(task, optimizer, use_ema, 0))
  return with_shardings(shapes, shard_like(shapes, shapes.params, mesh))


def initializer(task: Task, optimizer, seed: int, abstract: TrainState):
  """The jitted function from parameters to a state on its shards; those that lack are fresh.

  Each device makes its own part of the random numbers. abstract: of `abstract_state`.
  """
  # The program runs once and is full of random number generators: optimising it would take longer
  # than all else (49 s instead of 8 s for a small autoencoder on two CPU cores).
  return jax.jit(
    lambda params: _initialize(
      task, optimizer, bool(abstract.ema), seed, params, abstract.params.keys()
    ),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    compiler_options={'xla_backend_optimization_level': 0}, donate_argnums=0,
  )
