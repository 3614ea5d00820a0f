"""Compile the step, once for each shape of batch, and report its needs."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from diffusion_jax.parallel.mesh import abstract_batch
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import Step, make_step
from diffusion_jax.train.training import Training

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class StepReport:
  """Needs of the compiled step on one device, in bytes.

  seconds: to compile. parameters: trained scalars, over all devices. state: parameters, optimizer,
  average and frozen networks. temporary: activations, gradients and others during the step. flops:
  as XLA counts them, or None.
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
    """Return the report for people."""
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
    """Return what belongs into step.json."""
    return {**dataclasses.asdict(self), 'bytes': self.bytes}


def step_and_batch(training: Training, abstract: TrainState) -> tuple[Step, dict]:
  """Return (jitted step, shapes of a global batch), from the shapes of the state."""
  t = training
  step = make_step(
    t.task, t.optimizer, abstract, batch_size=t.loop.batch_size,
    ema_halflife_images=t.loop.ema_halflife_images, accumulation=t.loop.accumulation_steps,
    guard=t.safety,
  )
  spec = t.loader.spec()
  return step, abstract_batch({name: spec[name] for name in t.task.batch_fields}, t.mesh)


def compile_step(step: Any, state: TrainState, frozen: dict, batch: dict):
  """Return (compiled, report) of a jitted step for arguments like these, arrays or shapes."""
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


class StepPrograms:
  """A jitted step with one executable for each batch shape, the same in all processes at a time."""

  def __init__(
    self, step: Any, compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext
  ):
    """`compiling` surrounds every compilation, such as with a longer timeout."""
    self._step, self._compiling = step, compiling
    self._programs: dict[tuple, Callable] = {}

  def prepare(self, state: TrainState, frozen: dict, batch: dict) -> StepReport:
    """Compile for batches of this shape, given as arrays or as shapes with shardings."""
    with self._compiling():
      self._programs[_shapes(batch)], report = compile_step(self._step, state, frozen, batch)
    return report

  def __call__(self, state: TrainState, frozen: dict, batch: dict) -> Any:
    if (shapes := _shapes(batch)) not in self._programs:
      self.prepare(state, frozen, batch)
    return self._programs[shapes](state, frozen, batch)


def _shapes(batch: dict) -> tuple:
  return tuple((name, batch[name].shape, batch[name].dtype) for name in sorted(batch))


def held(tree: Any) -> int:
  """Return the bytes of a tree of arrays, or of shapes with shardings, on one device."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
