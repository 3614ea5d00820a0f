"""Compiles the step before the first one is made, and tells what it needs."""

import dataclasses
import math
import time
from typing import Any

import jax

from diffusion_jax.parallel.mesh import abstract_batch
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import Step, make_step
from diffusion_jax.train.training import Training

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class StepReport:
  """What the compiled step needs of one device; bytes, and operations by XLA's own count.

  state: parameters, optimizer, average and frozen networks as they lie on a device. batch: its part
  of the batch. temporary: activations, gradients and whatever else lives during the step. flops: of
  one step on one device, as XLA counts them; None where it does not. seconds: to compile.
  parameters: scalars that are trained, over all devices.
  """

  seconds: float
  parameters: int
  devices: int
  state: int
  batch: int
  temporary: int
  flops: float | None

  @property
  def bytes(self) -> int:
    """Memory of one device in all; the step's outputs take the place of the state."""
    return self.state + self.batch + self.temporary

  def lines(self, mesh: Any, batch_size: int) -> list[str]:
    """The report for people."""
    sizes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    size = lambda n: f'{n / MEGABYTE:,.1f} MB'
    flops = ''
    if self.flops:
      flops = f'; {self.flops * self.devices / batch_size / 1e9:,.3g} GFLOP an image'
    return [
      f'{self.parameters / 1e6:,.2f} M parameters on {self.devices} '
      f'{"device" if self.devices == 1 else "devices"}{f" ({sizes})" if sizes else ""}; '
      f'step compiled in {self.seconds:.1f} s{flops}',
      f'memory of each device: {size(self.bytes)} = state {size(self.state)} + batch '
      f'{size(self.batch)} + temporary {size(self.temporary)}',
    ]

  def as_json(self) -> dict[str, Any]:
    """For step.json."""
    return {**dataclasses.asdict(self), 'bytes': self.bytes}


def step_and_batch(training: Training, abstract: TrainState) -> tuple[Step, dict]:
  """(jitted step, shapes of a global batch) of what is trained, from the shapes of its state."""
  t = training
  step = make_step(
    t.task, t.optimizer, batch_size=t.loop.batch_size, mesh=t.mesh,
    ema_halflife_images=t.loop.ema_halflife_images, accumulation=t.loop.accumulation_steps,
    shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract), guard=t.safety,
  )
  spec = t.loader.spec()
  return step, abstract_batch({name: spec[name] for name in t.task.batch_fields}, t.mesh)


def compile_step(step: Any, state: TrainState, frozen: dict, batch: dict):
  """(compiled, report) of a jitted step for arguments of these shapes, types and shardings."""
  start = time.perf_counter()
  compiled = step.lower(state, frozen, batch).compile()
  seconds = time.perf_counter() - start
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
  flops = costs.get('flops', 0.0)
  report = StepReport(
    seconds=round(seconds, 3),
    parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    devices=jax.tree.leaves(state.params)[0].sharding.num_devices,
    state=held((state, frozen)), batch=held(batch),
    temporary=memory.temp_size_in_bytes if memory is not None else 0,
    flops=flops if flops > 0 else None,
  )
  return compiled, report


def held(tree: Any) -> int:
  """Bytes of a tree of arrays, or of shapes with shardings, on one device."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
