"""Bytes that the devices of a mesh send each other in a step, read from the compiled program.

Beside them stands what data parallelism and FSDP need at least. Bytes are those that a device
sends in a ring of n devices, the least that is possible: of an array of s bytes (n-1)/n s for
all-gather, reduce-scatter and all-to-all, twice that for all-reduce and s for collective-permute
(Thakur et al. 2005).
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.flops import read_arguments
from diffusion_jax.parallel.mesh import shard_params, with_shardings
from diffusion_jax.train.compile import step_and_batch
from diffusion_jax.train.state import TrainState, abstract_state
from diffusion_jax.train.training import Training
from diffusion_jax.types import Params

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = (.*?) (' + '|'.join(KINDS) + r')(-start)?\((.*)$')
_CALLED = re.compile(r'(?:to_apply|body|condition|calls|called_computations)=%?([\w.-]+)')
_BRANCHES = re.compile(r'(?:branch_computations|calls|called_computations)=\{([^}]*)\}')
_TRIPS = re.compile(r'known_trip_count[^}]*?"?n"?[:=]\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One in the program. arrays: (type, shape) of what it is about, whole as within its group.

  group: devices that take part together. times: how often a step runs it. source: the operation
  that it comes from, as JAX named it.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  group: int
  times: int = 1
  source: str = ''

  @property
  def bytes(self) -> int:
    """Of the arrays, whole."""
    return sum(BYTES.get(kind, 4) * math.prod(shape) for kind, shape in self.arrays)

  @property
  def moved(self) -> float:
    """Bytes that a device sends in a step."""
    return self.times * moved(self.kind, self.bytes, self.group)


def moved(kind: str, size: float, group: int) -> float:
  """Bytes that each of `group` devices sends for an array of `size` bytes."""
  if group <= 1:
    return 0.0
  if kind == 'collective-permute':
    return size
  return (2 if kind == 'all-reduce' else 1) * size * (group - 1) / group


def read_collectives(text: str, devices: int) -> list[Collective]:
  """All collectives of a compiled program (`compiled.as_text()`) for so many devices."""
  computations, entry = _computations(text)
  times = _times(computations, entry)
  found = []
  for name, lines in computations.items():
    for line in lines:
      match = _LINE.match(line)
      if match and times.get(name):
        found.append(_collective(match, line, devices, times[name]))
  return found


def _collective(match: re.Match, line: str, devices: int, times: int) -> Collective:
  _, shape, kind, start, rest = match.groups()
  arrays = [(kind_, _sizes(sizes)) for kind_, sizes in _SHAPE.findall(shape)]
  if start and kind != 'all-reduce':  # (operands, results, ...): only arrays that are results.
    arrays = arrays[len(arrays) // 2 :] if kind == 'all-gather' else arrays[:1]
  group = _group(line, devices)
  if kind == 'reduce-scatter':  # The result is a part of the whole.
    arrays = [(kind_, (group, *sizes)) for kind_, sizes in arrays]
  source = re.search(r'op_name="([^"]*)"', rest)
  return Collective(kind, tuple(arrays), group, times, source.group(1) if source else '')


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(',') if size)


def _group(line: str, devices: int) -> int:
  """Devices in a group: {{0,1},{2,3}}, or [groups,size]<=[...]; none is all of them."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if listed:
    return len(listed.group(1).split(','))
  counted = re.search(r'replica_groups=\[([\d,]+)\]<=', line)
  if counted:
    return int(counted.group(1).split(',')[-1])
  return devices


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: its lines}, the name of the one that is run)."""
  found: dict[str, list[str]] = {}
  entry, current = '', None
  for line in text.splitlines():
    head = re.match(r'^(ENTRY )?%?([\w.-]+) \(.*\{\s*$', line)
    if head:
      current = found.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    elif current is not None:
      current.append(line)
  return found, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
  """How often a run of the entry runs each computation; a loop of unknown length counts once."""
  times: dict[str, int] = {}

  def visit(name: str, count: int) -> None:
    times[name] = times.get(name, 0) + count
    for line in computations.get(name, ()):
      trips = _TRIPS.search(line) if ' while(' in line else None
      inner = count * int(trips.group(1)) if trips else count
      called = _CALLED.findall(line)
      for group in _BRANCHES.findall(line):
        called += [part.strip().lstrip('%') for part in group.split(',') if part.strip()]
      for one in called:
        visit(one, inner)

  visit(entry, 1)
  return times


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
  """Bytes that a device sends in a step, by kind; kinds that are not there are left out."""
  total: dict[str, float] = {}
  for one in collectives:
    total[one.kind] = total.get(one.kind, 0.0) + one.moved
  return {kind: round(total[kind]) for kind in KINDS if total.get(kind)}


SMALL = 4096
"""Bytes of an all-reduce up to which it is taken for sums of losses, norms and metrics."""


def step_collectives(training: Training) -> dict[str, Any]:
  """Compiles a step, without running it, and reads what its devices send each other.

  moved_bytes: that a device sends, by kind. formula_bytes: the same by `formula`.
  beside_parameters: what moves anything else than parameters, their gradients, and sums for
  metrics.
  """
  t, mesh = training, training.mesh
  with jax.set_mesh(mesh):
    abstract = abstract_of(t)
    frozen = {
      role: with_shardings(params, shard_params(params, mesh))
      for role, params in t.task.frozen.items()
    }
    step, batch = step_and_batch(t, abstract)
    text = step.lower(abstract, frozen, batch).compile().as_text()
    read = read_arguments(lambda frozen: _loss(t, abstract, frozen, batch), frozen)
  found = read_collectives(text, mesh.size)
  return {
    'batch_size': t.loop.batch_size,
    'parameter_bytes': sum(_bytes(leaf) for leaf in abstract.params.values()),
    'moved_bytes': by_kind(found),
    'formula_bytes': formula(abstract.params, read, mesh),
    'beside_parameters': beside_parameters(found, [abstract.params, *read]),
    'counts': _counts(found),
  }


def abstract_of(training: Training) -> TrainState:
  """Shapes of the state that a run begins with."""
  return abstract_state(
    training.task, training.optimizer, training.loop.ema_halflife_images > 0, training.mesh
  )


def _loss(training: Training, state: Any, frozen: dict, batch: dict) -> jax.Array:
  zeros = lambda tree: jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), tree)
  params, carry, batch = zeros(state.params), zeros(state.carry), zeros(batch)
  return training.task.loss(params, frozen, carry, batch, jax.random.key(0), 0)[0]


def formula(params: Params, frozen: list[jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, int]:
  """Bytes that a device sends in a step, by kind, where examples alone are split otherwise.

  A parameter that lies whole on every device has its gradient all-reduced (data parallelism). One
  that is split over fsdp is gathered for the forward and again for the backward pass, and its
  gradient is reduced and scattered (Rajbhandari et al. 2020, ZeRO stage 3: three times its size);
  over data that part is all-reduced. Frozen parameters are gathered once.
  """
  ways = {axis: mesh.shape[axis] for axis in ('data', 'fsdp')}
  total = {'all-gather': 0.0, 'reduce-scatter': 0.0, 'all-reduce': 0.0}
  for leaf in params.values():
    size = _bytes(leaf)
    if not _split(leaf):
      total['all-reduce'] += moved('all-reduce', size, math.prod(ways.values()))
      continue
    total['all-gather'] += 2 * moved('all-gather', size, ways['fsdp'])
    total['reduce-scatter'] += moved('reduce-scatter', size, ways['fsdp'])
    total['all-reduce'] += moved('all-reduce', size / ways['fsdp'], ways['data'])
  for leaf in frozen:
    if _split(leaf):
      total['all-gather'] += moved('all-gather', _bytes(leaf), ways['fsdp'])
  return {kind: round(size) for kind, size in total.items() if size}


def _split(leaf: Any) -> bool:
  return leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def _bytes(leaf: Any) -> int:
  return leaf.size * leaf.dtype.itemsize


def beside_parameters(found: list[Collective], trees: list[Any]) -> list[str]:
  """The collectives, in words, that move what is neither a parameter, a gradient nor small.

  Shapes tell: an activation has the shape of a parameter only by accident. Dimensions of 1 and the
  order of the others do not count, as XLA may turn an array to gather it; and the gradient of a
  convolution may come in matrices.
  """
  key = lambda shape: tuple(sorted(size for size in shape if size > 1))
  shapes = [leaf.shape for leaf in jax.tree.leaves(trees)]
  known = {key(part) for shape in shapes for part in (shape, shape[-2:])}
  out = []
  for one in found:
    strange = [shape for _, shape in one.arrays if key(shape) not in known]
    if one.kind in ('all-gather', 'reduce-scatter'):
      bad = bool(strange)
    elif one.kind == 'all-reduce':
      bad = 4 * sum(map(math.prod, strange)) > SMALL
    else:
      bad = one.moved > 0
    if bad:
      shapes = ', '.join(str(list(shape)) for shape in strange or [s for _, s in one.arrays])
      out.append(f'{one.kind} of {shapes}, {one.times} x, {one.source or "unnamed"}')
  return out


def _counts(found: list[Collective]) -> dict[str, int]:
  counts: dict[str, int] = {}
  for one in found:
    counts[one.kind] = counts.get(one.kind, 0) + one.times
  return counts
