"""What tasks share that train a network on noised data by an `Objective`."""

import jax
import jax.numpy as jnp

from diffusion_jax.diffusion.timesteps import LossHistory, update_history
from diffusion_jax.diffusion.training import Losses, Objective
from diffusion_jax.train.tasks.task import Memory, Seen, Task, mean_metric

TIME_BUCKETS = 10


class NoisingTask(Task):
  """A task with an objective, whose memory are the losses that importance sampling needs."""

  objective: Objective

  def memory(self) -> Memory:
    history = self.objective.history()
    return history._asdict() if history else {}

  def remember(self, memory: Memory, seen: Seen) -> Memory:
    return update_history(LossHistory(**memory), *seen)._asdict() if memory else memory

  def summary(self, losses: Losses, memory: Memory) -> tuple[jax.Array, tuple]:
    """What `loss` returns: the mean, metrics with the error by noise level, and what was seen."""
    bucket = jnp.floor(losses.level.position * TIME_BUCKETS).astype(int)
    which = jax.nn.one_hot(bucket, TIME_BUCKETS)
    metrics = {
      'loss': mean_metric(losses.loss),
      'loss_by_timestep': (losses.error @ which, which.sum(axis=0)),
    }
    seen = (losses.level.label, losses.error) if memory else ()
    return losses.loss.mean(), (metrics, seen)


def history_of(memory: Memory) -> LossHistory | None:
  """The memory as `Objective.losses` takes it."""
  return LossHistory(**memory) if memory else None
