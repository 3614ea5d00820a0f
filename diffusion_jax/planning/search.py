"""The mesh, remat and accumulation with which a config's batch takes the least time on a target."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from diffusion_jax.build import build_shapes
from diffusion_jax.config import MeshConfig
from diffusion_jax.errors import UserError
from diffusion_jax.parallel.collectives import formula
from diffusion_jax.parallel.mesh import make_mesh
from diffusion_jax.planning.chips import Chip
from diffusion_jax.planning.flops import step_flops
from diffusion_jax.planning.plan import Plan
from diffusion_jax.planning.targets import Target
from diffusion_jax.planning.unread import with_model
from diffusion_jax.train.compile import abstract_arguments, held
from diffusion_jax.train.training import Training

AXES = ('data', 'fsdp', 'tensor', 'spatial')
WAYS = (1, 2, 4)
"""Of tensor and spatial, which send activations in every layer."""
PARTS = (1, 2, 4, 8, 16)
AGAIN = {'none': 1.0, 'block': 4 / 3}
"""By remat: FLOPs of a step to those of the model, with one forward pass more or not."""


@dataclasses.dataclass
class Choice:
  """One candidate. examples: of a device at a time. state: bytes of a device, exact. seconds: the
  longest of arithmetic and network by formula, what the order of compiling follows. plan: where it
  was compiled. why: it was not, or lost."""

  mesh: tuple[int, ...]
  remat: str
  parts: int
  examples: int
  state: int = 0
  seconds: float = 0.0
  plan: Plan | None = None
  why: str = ''

  @property
  def fits(self) -> bool:
    """Whether it has been compiled for the target's memory."""
    return self.plan is not None and not self.plan.error

  def keys(self) -> dict[str, Any]:
    """Return what it sets in a config."""
    sizes = zip(AXES, self.mesh, strict=True)
    return {
      **{f'mesh.{axis}': size for axis, size in sizes}, 'remat': self.remat,
      'loop.accumulation_steps': self.parts,
    }

  def applied(self, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with its keys."""
    mesh = config['mesh'] | dict(zip(AXES, self.mesh, strict=True))
    loop = config['loop'] | {'accumulation_steps': self.parts}
    return {**config, 'mesh': mesh, 'loop': loop, 'remat': self.remat}

  def needs_no_less_than(self, other: 'Choice') -> bool:
    """Whether it takes at least the memory of another, whatever the compiler does."""
    same = self.remat == other.remat and self.mesh[2:] == other.mesh[2:]
    return same and self.examples >= other.examples and self.state >= other.state


def candidates(devices: int, batch_size: int) -> Iterator[Choice]:
  """Yield all ways to split a batch over so many devices, and over parts that are accumulated."""
  for fsdp, tensor, spatial in itertools.product(range(1, devices + 1), WAYS, WAYS):
    data, rest = divmod(devices, fsdp * tensor * spatial)
    # Together they are refused, see `parallel.mesh`.
    if rest or not data or (tensor > 1 and spatial > 1):
      continue
    for remat, parts in itertools.product(AGAIN, PARTS):
      examples, odd = divmod(batch_size, data * fsdp * parts)
      if not odd and examples:
        yield Choice((data, fsdp, tensor, spatial), remat, parts, examples)


def search(
  config: dict[str, Any], target: Target, compiled: Callable[[dict[str, Any]], Plan], most: int
) -> list[Choice]:
  """Return all candidates, the best first: those that were compiled by the time of a step.

  config.loop.batch_size stays. In the order of the times by formula, those without tensor and
  spatial first, candidates are compiled until `most` of them fit. UserError: CPUs, of which no
  speed is known, or a config that fits nowhere on the target.
  """
  if target.chip is None:
    raise UserError(f'--search compares times, which {target} has none of; give TPUs or GPUs.')
  every = list(candidates(target.count, config['loop']['batch_size']))
  if not every:
    raise UserError(
      f'loop.batch_size {config["loop"]["batch_size"]} cannot be split over {target}; make it a '
      f'multiple of {target.count}.'
    )
  _predict(config, target, every)
  order = sorted(every, key=lambda one: (one.mesh[2] * one.mesh[3], one.seconds, one.parts))
  return choose_best(config, order, target.chip, compiled, most)


def choose_best(
  config: dict[str, Any], order: list[Choice], chip: Chip,
  compiled: Callable[[dict[str, Any]], Plan], most: int,
) -> list[Choice]:
  """Compile candidates in this order until `most` fit, and return all of them, the best first."""
  refused: list[Choice] = []
  for one in order:
    if one.state > chip.memory:
      one.why = f'its state alone needs {one.state / 1e9:.3g} GB of {chip.memory / 1e9:.3g} GB'
    elif sum(other.fits for other in order) >= most:
      one.why = 'not compiled: slower by formula'
    elif smaller := next((other for other in refused if one.needs_no_less_than(other)), None):
      one.why = f'not compiled: {_name(smaller)} needs no more, and does not fit'
    else:
      one.plan = compiled(one.applied(config))
      one.why = one.plan.error
      if one.plan.error:
        refused.append(one)
  time = lambda one: one.plan.estimate.step if one.fits else math.inf
  ranked = sorted(order, key=lambda one: (time(one), not one.plan, one.seconds))
  if ranked[0].fits:
    for one in filter(lambda one: one.fits, ranked[1:]):
      one.why = f'{time(one) / time(ranked[0]):.2f} times as long'
  return ranked


def _name(one: Choice) -> str:
  sizes = ' x '.join(f'{axis} {n}' for axis, n in zip(AXES, one.mesh, strict=True) if n > 1)
  return f'{sizes or "one device"}, remat {one.remat}, {one.parts} parts'


def _predict(config: dict[str, Any], target: Target, every: list[Choice]) -> None:
  """Fill in state and seconds, from one trace of the model and the shapes on each mesh."""
  devices, chip = target.devices(), target.chip
  one_device = Choice((1, 1, 1, 1), 'none', 1, config['loop']['batch_size']).applied(config)
  with with_model(one_device) as complete:
    base = build_shapes(complete, devices[:1])
  with jax.set_mesh(base.mesh):
    _, (state, frozen, batch) = abstract_arguments(base)
    flops = step_flops(base.task, state, frozen, batch).total
  known: dict[tuple[int, ...], tuple[int, dict[str, int]]] = {}
  for one in every:
    if one.mesh not in known:
      known[one.mesh] = _on_mesh(base, one.mesh, config, devices)
    one.state, sent = known[one.mesh]
    # Parameters are gathered anew for each part; gradients are reduced for each, too.
    network = one.parts * sum(sent.values()) / chip.link
    arithmetic = AGAIN[one.remat] * flops / target.count / chip.peak(config['dtype'])
    one.seconds = max(arithmetic, network)


def _on_mesh(
  base: Training, sizes: tuple[int, ...], config: dict[str, Any], devices: Any
) -> tuple[int, dict[str, int]]:
  """Return (bytes of the state on a device, bytes that it sends by `formula`) on another mesh."""
  own = {**config['mesh'], **dict(zip(AXES, sizes, strict=True))}
  mesh = make_mesh(MeshConfig(**own), devices)
  with jax.set_mesh(mesh):
    _, (state, frozen, _) = abstract_arguments(dataclasses.replace(base, mesh=mesh))
  return held((state, frozen)), formula(state.params, jax.tree.leaves(frozen), mesh)


def search_lines(choices: list[Choice], most: int = 12) -> list[str]:
  """Return the best candidate's keys, and a table of the first ones with why others lose."""
  best = choices[0]
  lines = ['  step        state       candidate']
  for one in choices[:most]:
    time = f'{one.plan.estimate.step * 1e3:,.4g} ms' if one.fits else '-'
    why = f': {one.why}' if one.why else ''
    lines.append(
      f'  {time:<10}  {one.state / 1e9:<6.3g} GB   {_name(one)}, {one.examples} at a time{why}'
    )
  if len(choices) > most:
    lines.append(f'  and {len(choices) - most} more')
  if best.fits:
    keys = ' '.join(f'--config.{key}={value}' for key, value in best.keys().items())
    return [f'the best of {sum(one.fits for one in choices)} compiled: {keys}', *lines]
  return [f'none of {len(choices)} candidates fits', *lines]
