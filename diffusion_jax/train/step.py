"""The training step: one pure function for every task."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_jax.parallel.sharding import BATCH
from diffusion_jax.train import ema
from diffusion_jax.train.state import TrainState, replicated
from diffusion_jax.train.tasks.task import Metrics, Task

Step = Callable[[TrainState, dict, dict], tuple[TrainState, Metrics]]


def _microbatches(batch: dict, count: int, mesh: Mesh) -> dict:
  """[b ...] -> [count, b / count ...]; each device keeps its own examples."""

  def one(x):
    # Taking every count-th example keeps each microbatch spread over all devices.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    spec = jax.sharding.PartitionSpec(None, *BATCH)
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))

  return jax.tree.map(one, batch)


def _gradients(task: Task, state: TrainState, frozen, batch, key, accumulation: int, mesh: Mesh):
  """Mean gradient and summed metrics over the batch, in `accumulation` parts one after another."""

  def part(micro, key):
    (_, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(
      state.params, frozen, micro, key, state.step
    )
    return grads, metrics

  if accumulation == 1:
    return part(batch, key)

  def body(total, inputs):
    micro, index = inputs
    return jax.tree.map(jnp.add, total, part(micro, jax.random.fold_in(key, index))), None

  parts = _microbatches(batch, accumulation, mesh)
  shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), key)
  zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  (grads, metrics), _ = jax.lax.scan(body, zero, (parts, jnp.arange(accumulation)))
  return jax.tree.map(lambda g: g / accumulation, grads), metrics


def make_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  *,
  batch_size: int,
  ema_halflife_images: float,
  accumulation: int,
  mesh: Mesh,
  shardings: TrainState,
) -> Step:
  """The jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

  Metrics are (total, count) pairs that add up over steps. The step's randomness is
  fold_in(key, step), so a step can be repeated exactly.
  """

  def step(state: TrainState, frozen, batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grads, metrics = _gradients(task, state, frozen, batch, key, accumulation, mesh)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = task.constrain(optax.apply_updates(state.params, updates))
    average = state.ema
    if average:
      average = ema.update(
        average, params, ema.decay_per_step(ema_halflife_images, batch_size, state.step)
      )
    one = jnp.ones((), jnp.float32)
    metrics['gradient_norm'] = (optax.tree.norm(grads), one)
    return TrainState(state.step + 1, state.key, params, opt_state, average), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
