"""Steps of a run made again from its checkpoint, as the train loop makes them."""

import contextlib
from collections.abc import Collection

import jax

from diffusion_jax.backend.xla import block_on_cpu
from diffusion_jax.checkpoint.digests import digests
from diffusion_jax.files import say
from diffusion_jax.parallel.mesh import put_batch, put_params
from diffusion_jax.runs.run_card import PARAMS, digest_of, window_digests
from diffusion_jax.train.compile import StepPrograms, abstract_of, step_and_batch
from diffusion_jax.train.meter import Goodput, Meter
from diffusion_jax.train.saving import Saver
from diffusion_jax.train.training import Training


def rerun(
  training: Training, first: int, last: int, saved: Collection[int]
) -> dict[int, dict[str, str]]:
  """Make the steps after the checkpoint of `first` up to `last` again; return {step: digests}.

  They are those of `runs.run_card`: of each window of metrics, and of the parameters at the steps
  `saved` and at the first. Nothing in the run's folder changes. UserError: the checkpoint is
  damaged, or of another model.
  """
  t = training
  with jax.set_mesh(t.mesh):
    abstract = abstract_of(t)
    with contextlib.closing(Saver(t, say, read_only=True)) as saver:
      found = saver.restore_run(abstract, first)
    state, meter = found.state, Meter(t.loop.batch_size, Goodput(), found.totals)
    frozen = {role: put_params(params, t.mesh) for role, params in t.task.frozen.items()}
    update = StepPrograms(step_and_batch(t, abstract)[0])
    made = {first: {PARAMS: digest_of(digests(state.params))}}
    for step in range(first + 1, last + 1):
      batch = next(t.loader)
      fields = {name: batch[name] for name in t.task.batch_fields}
      state, metrics = update(state, frozen, put_batch(fields, t.mesh))
      block_on_cpu(metrics)
      meter.add(metrics)
      made[step] = {}
      if step % t.loop.log_every_steps == 0:
        made[step] |= window_digests(jax.device_get(meter.close_window()[0]))
      if step in saved:
        made[step][PARAMS] = digest_of(digests(state.params))
  return made
