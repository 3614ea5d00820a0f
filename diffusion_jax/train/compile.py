"""Compile the step, once for each shape of batch, and report its needs."""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from diffusion_jax.parallel.mesh import abstract_batch, shard_params, with_shardings
from diffusion_jax.train.state import TrainState, abstract_state
from diffusion_jax.train.step import Step, make_step
from diffusion_jax.train.training import Training

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class StepReport:
  """Needs of the compiled step on one device, in bytes.

  seconds: to compile. parameters: trained scalars, over all devices. state: parameters, optimizer,
  average and frozen networks. temporary: activations, gradients and others during the step. flops:
  as XLA counts them, or None. size: of the images, '' where there are none. optimizer: the part of
  `state` that is the optimizer's.
  """

  seconds: float
  parameters: int
  devices: int
  state: int
  batch: int
  temporary: int
  flops: float | None
  size: str = ''
  optimizer: int = 0

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
      f'memory of each device: {size(self.bytes)} = state {size(self.state)}, of which '
      f'optimizer {size(self.optimizer)}, + batch {size(self.batch)} + temporary '
      f'{size(self.temporary)}',
    ]

  def as_json(self) -> dict[str, Any]:
    """Return what belongs into step.json."""
    return {**dataclasses.asdict(self), 'bytes': self.bytes}


def reports_as_json(reports: Sequence[StepReport]) -> dict[str, Any]:
  """Return what belongs into step.json: the first, and what differs between several sizes."""
  first, *others = (report.as_json() for report in reports)
  differ = ('size', 'seconds', 'batch', 'temporary', 'flops', 'bytes')
  each = [{name: one[name] for name in differ} for one in (first, *others)]
  return first | ({'sizes': each} if others else {})


def step_and_batch(training: Training, abstract: TrainState) -> tuple[Step, dict]:
  """Return (jitted step, shapes of the next global batch), from the shapes of the state."""
  t = training
  step = make_step(
    t.task, t.optimizer, abstract, batch_size=t.loop.batch_size,
    ema_halflife_images=t.loop.ema_halflife_images, accumulation=t.loop.accumulation_steps,
    guard=t.safety,
  )
  return step, batch_of(t)


def abstract_of(training: Training) -> TrainState:
  """Return the shapes of the state that a run begins with, on their shards."""
  t = training
  return abstract_state(t.task, t.optimizer, t.loop.ema_halflife_images > 0, t.mesh)


def abstract_arguments(training: Training) -> tuple[Step, tuple[TrainState, dict, dict]]:
  """Return (jitted step, (state, frozen, batch) as shapes): what `compile_step` takes.

  Nothing is allocated on the devices. Call it, and compile, under `jax.set_mesh`.
  """
  abstract, mesh = abstract_of(training), training.mesh
  frozen = {
    role: with_shardings(params, shard_params(params, mesh))
    for role, params in training.task.frozen.items()
  }
  step, batch = step_and_batch(training, abstract)
  return step, (abstract, frozen, batch)


def batch_of(training: Training, bucket: int | None = None) -> dict:
  """Return the shapes of a global batch of one bucket; None: of the next batch's."""
  spec = training.loader.spec(bucket)
  return abstract_batch(
    {name: spec[name] for name in training.task.batch_fields}, training.mesh
  )


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
    flops=flops if flops > 0 else None, size=_size_of(batch), optimizer=held(state.opt_state),
  )
  return compiled, report


def _size_of(batch: dict) -> str:
  """The height and width of a batch's images or latents, in words."""
  found = [x.shape[1:3] for x in batch.values() if len(x.shape) == 4]
  return ' x '.join(map(str, found[0])) if found else ''


class StepPrograms:
  """A jitted step with one executable for each batch shape, the same in all processes at a time.

  reports: of the executables so far, in the order in which they were compiled.
  """

  def __init__(
    self, step: Any, compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    meet: Callable[[], None] = lambda: None,
  ):
    """compiling: surrounds every compilation that is waited for, such as with a longer timeout.
    meet: called before the first step of each shape, for processes to wait for each other."""
    self._step, self._compiling, self._meet = step, compiling, meet
    self._programs: dict[tuple, Callable] = {}
    self._met: set[tuple] = set()
    self.reports: list[StepReport] = []
    self._changed, self._stop = threading.Condition(), False
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None

  def prepare(self, state: TrainState, frozen: dict, batch: dict) -> StepReport:
    """Compile for batches of this shape, given as arrays or as shapes with shardings."""
    with self._compiling():
      return self._compile(state, frozen, batch)

  def prepare_ahead(
    self, state: TrainState, frozen: dict, batches: Sequence[Callable[[], dict]]
  ) -> None:
    """Compile for these batches, one after the other, while steps are made; in a thread.

    A step for which none is compiled yet waits until it is. batches: functions that return shapes
    with shardings, called in the thread. An error is raised by the next step.
    """
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    state, frozen = jax.tree.map(like, (state, frozen))  # The arrays are donated meanwhile.
    mesh = state.step.sharding.mesh

    def work() -> None:
      with jax.set_mesh(mesh):
        for batch in batches:
          if self._stop:
            return
          self._compile(state, frozen, batch())

    def run() -> None:
      try:
        work()
      except BaseException as error:
        self._error = error
      with self._changed:
        self._changed.notify_all()

    # Not a daemon: an interpreter that ends while XLA compiles would abort.
    self._thread = threading.Thread(target=run, name='compiling')
    self._thread.start()

  def _compile(self, state: TrainState, frozen: dict, batch: dict) -> StepReport:
    program, report = compile_step(self._step, state, frozen, batch)
    with self._changed:
      self._programs[_shapes(batch)] = program
      self.reports.append(report)
      self._changed.notify_all()
    return report

  @property
  def busy(self) -> bool:
    """Whether programs are compiled in the background."""
    return self._thread is not None and self._thread.is_alive()

  def _wait_for(self, shapes: tuple) -> None:
    """Wait until there is a program for batches of that shape, or none is compiled any more."""
    with self._compiling(), self._changed:
      while shapes not in self._programs and self.busy and self._error is None:
        self._changed.wait(1)

  def __call__(self, state: TrainState, frozen: dict, batch: dict) -> Any:
    if (shapes := _shapes(batch)) not in self._programs and self.busy:
      self._wait_for(shapes)
    if self._error is not None:
      raise self._error
    if shapes not in self._met:
      if shapes not in self._programs:
        self.prepare(state, frozen, batch)
      self._meet()
      self._met.add(shapes)
    return self._programs[shapes](state, frozen, batch)

  def close(self, wait: bool = True) -> None:
    """Compile nothing further; wait for what is being compiled, or leave that to the end of Python.
    """
    self._stop = True
    if self._thread is not None and wait:
      self._thread.join()


def _shapes(batch: dict) -> tuple:
  return tuple((name, batch[name].shape, batch[name].dtype) for name in sorted(batch))


def held(tree: Any) -> int:
  """Return the bytes of a tree of arrays, or of shapes with shardings, on one device."""
  return sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
