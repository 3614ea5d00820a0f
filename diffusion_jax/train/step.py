"""The training step: one pure function for every task."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.backend.cpu import global_norm
from diffusion_jax.backend.xla import jit, separate
from diffusion_jax.parallel.mesh import batch_sharding
from diffusion_jax.train import ema
from diffusion_jax.train.guard import GuardConfig, choose, judge
from diffusion_jax.train.meter import Metrics
from diffusion_jax.train.optimizer import gradients_at
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.tasks.task import Task

DEFAULT = GuardConfig()

Step = Callable[[TrainState, dict, dict], tuple[TrainState, Metrics]]


def _microbatches(batch: dict, count: int, mesh: Mesh) -> dict:
  """[b ...] -> [count, b / count ...]; each device keeps its own examples."""

  def one(x):
    # Taking every count-th example keeps each microbatch spread over all devices.
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    spec = PartitionSpec(None, *batch_sharding(x.shape[1:], mesh).spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(one, batch)


def _gradients(task: Task, state: TrainState, frozen, batch, key, accumulation: int, mesh: Mesh):
  """Return ((mean gradient, mean loss, merged metrics), what was observed of each example)."""
  params = gradients_at(state.opt_state, state.params)
  if params is not state.params:
    params = task.constrain(params, state.carry)

  def part(micro, key):
    (loss, (metrics, observed)), grads = jax.value_and_grad(task.loss, has_aux=True)(
      params, frozen, state.carry, micro, key, state.step
    )
    return (grads, loss, metrics), observed

  if accumulation == 1:
    return part(batch, key)

  def body(total, inputs):
    micro, index = inputs
    one, observed = part(micro, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, one), observed

  parts = _microbatches(batch, accumulation, mesh)
  shapes, _ = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), key)
  zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  (grads, loss, metrics), observed = jax.lax.scan(body, zero, (parts, jnp.arange(accumulation)))
  observed = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observed)
  grads, loss = jax.tree.map(lambda total: total / accumulation, (grads, loss))
  return (grads, loss, metrics), observed


def make_step(
  task: Task, optimizer: optax.GradientTransformationExtraArgs, abstract: TrainState, *,
  batch_size: int, ema_halflife_images: float, accumulation: int = 1, guard: GuardConfig = DEFAULT,
) -> Step:
  """The jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

  A rejected step changes only the step number and the guard; if not finite, its metrics do not
  count. Metrics are averages that merge over steps. Randomness is fold_in(key, step): steps repeat
  exactly. abstract: shapes of the state on their shards, of `state.abstract_state`.
  """
  mesh = abstract.step.sharding.mesh

  def on_mesh(state: TrainState, frozen, batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    (grads, loss, metrics), observed = _gradients(
      task, state, frozen, batch, key, accumulation, mesh
    )
    # Across parts of a program XLA's partitioner knows nothing of how arrays are split.
    own = separate(advance) if mesh.size == 1 else advance
    return own(state, grads, loss, metrics, observed)

  def advance(state: TrainState, grads, loss, metrics, observed) -> tuple[TrainState, Metrics]:
    norm = global_norm(grads)
    use, finite, watch = judge(state.guard, guard, loss, norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, use=use, norm=norm)
    carry = choose(use, task.next_carry(state.carry, observed), state.carry)
    params = task.constrain(optax.apply_updates(state.params, updates), carry)
    average = state.ema
    if average:
      decay = ema.decay_per_step(ema_halflife_images, batch_size, state.step)
      average = ema.update(average, params, jnp.where(use, decay, 1.0))
    one = jnp.ones((), jnp.float32)
    metrics = {**metrics, 'gradient_norm': Average(norm, one)}
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
    given_up = watch.in_a_row >= guard.max_skipped_in_a_row
    metrics['skipped_fraction'] = Average(1 - use.astype(jnp.float32), one)
    metrics['given_up'] = Average(given_up.astype(jnp.float32), one)
    return TrainState(state.step + 1, state.key, params, opt_state, average, carry, watch), metrics

  def step(state: TrainState, frozen, batch) -> tuple[TrainState, Metrics]:
    # Not left to the caller: without the constraints in the networks, XLA's partitioner gave wrong
    # gradients of CLIP's vision tower with 2 x 2 x 2 devices on data, fsdp and tensor.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return on_mesh(state, frozen, batch)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  whole = NamedSharding(mesh, PartitionSpec())
  return jit(step, donate_argnums=0, out_shardings=(shardings, whole))
