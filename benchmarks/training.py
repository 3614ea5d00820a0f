"""Speed of training steps, and of the loader that feeds them."""

import dataclasses
import itertools
import time
from typing import Any

import jax

from benchmarks.timing import compile_twice, peak_memory, quartiles, utilisation
from diffusion_jax.parallel.mesh import put_batch, put_params
from diffusion_jax.planning.flops import step_flops
from diffusion_jax.train.compile import abstract_of, compile_step, step_and_batch
from diffusion_jax.train.health import Compilations
from diffusion_jax.train.state import TrainState, initializer
from diffusion_jax.train.training import Training


@dataclasses.dataclass(frozen=True)
class Counts:
  """warmup: repetitions that do not count, at least one. measured: those that do."""

  warmup: int = 3
  measured: int = 20


def measure_training(training: Training, counts: Counts) -> dict[str, Any]:
  """Steps as the train loop makes them: the state donated, batches from the loader, one step ahead.

  Times are between the ends of successive steps; waiting for a batch is part of them.
  """
  t = training
  with jax.set_mesh(t.mesh):
    abstract = abstract_of(t)
    frozen = {role: put_params(params, t.mesh) for role, params in t.task.frozen.items()}

    def compiled():
      step, batch = step_and_batch(t, abstract)
      return (*compile_step(step, abstract, frozen, batch), batch)

    (update, report, batch), compiling = compile_twice(compiled)
    flops = step_flops(t.task, abstract, frozen, batch)
    state = initializer(t.task, t.optimizer, t.loop.seed, abstract)(t.start(t.mesh))
    seconds, waited, recompilations = _steps(t, update, state, frozen, counts)
    median = quartiles(seconds)['median']
    return {
      'batch_size': t.loop.batch_size, 'accumulation_steps': t.loop.accumulation_steps,
      'parameters': report.parameters,
      'step_seconds': quartiles(seconds), 'steps': len(seconds),
      'images_per_second': round(t.loop.batch_size / median, 3),
      **utilisation(flops, median, t.mesh, t.config['dtype']),
      'flops_by_xla': report.flops and report.flops * report.devices,
      'data_wait_fraction': round(waited / sum(seconds), 4),
      'recompilations': recompilations,
      'compile': compiling,
      'memory': {**peak_memory(), 'state_bytes': report.state, 'batch_bytes': report.batch,
                 'temporary_bytes': report.temporary},
    }


def _steps(
  training: Training, update: Any, state: TrainState, frozen: dict, counts: Counts
) -> tuple[list[float], float, int]:
  """(seconds of each step, seconds of waiting for data, recompilations) after the warm-up."""
  fields, loader, compilations = training.task.batch_fields, training.loader, Compilations()
  ended, waits, before, pending = [], [], 0, None
  try:
    for index in range(max(counts.warmup, 1) + counts.measured + 1):
      start = time.perf_counter()
      batch = next(loader)
      waits.append(time.perf_counter() - start)
      state, metrics = update(
        state, frozen, put_batch({name: batch[name] for name in fields}, training.mesh)
      )
      # The step before has ended while this one's batch was made and sent.
      jax.block_until_ready(pending)
      ended.append(time.perf_counter())
      pending = metrics
      if index == max(counts.warmup, 1):
        before = compilations.count
    jax.block_until_ready(pending)
    count = compilations.count - before
  finally:
    compilations.close()
  ended = ended[-counts.measured - 1 :]
  seconds = [after - before for before, after in itertools.pairwise(ended)]
  return seconds, sum(waits[-counts.measured :]), count


def measure_data(training: Training, counts: Counts) -> dict[str, Any]:
  """The loader alone: batches as fast as it gives them, read and transformed but not sent."""
  seconds = []
  for _ in range(max(counts.warmup, 1) + counts.measured):
    start = time.perf_counter()
    next(training.loader)
    seconds.append(time.perf_counter() - start)
  seconds = seconds[-counts.measured :]
  # Batches come in bursts where several threads make them: their mean is what training would see.
  mean = sum(seconds) / len(seconds)
  rows = training.loop.batch_size / jax.process_count()
  return {
    'batch_size': training.loop.batch_size, 'batch_seconds': quartiles(seconds),
    'batches': len(seconds), 'images_per_second': round(rows / mean, 1),
    'workers': training.config['data']['workers'], 'memory': peak_memory(),
  }
