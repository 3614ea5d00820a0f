"""Bytes that the devices of a mesh send each other, read from the text of a compiled program.

They are those that a device sends in a ring of n devices, the least that is possible: of an array
of s bytes (n-1)/n s for all-gather, reduce-scatter and all-to-all, twice that for all-reduce and s
for collective-permute (Thakur et al. 2005). `formula` gives what data parallelism and FSDP need.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion_jax.types import Params

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4,
         'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8}
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = (.*?) (' + '|'.join(KINDS) + r')(-start)?\((.*)$')
_CALLED = re.compile(r'(?:to_apply|body|condition|calls|called_computations)=%?([\w.-]+)')
_BRANCHES = re.compile(r'(?:branch_computations|calls|called_computations)=\{([^}]*)\}')
SOURCE = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count[^}]*?"?n"?[:=]\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One in the program. arrays: (type, shape) of what it is about, whole as within its group.

  group: devices that take part together. times: how often a step runs it. source: the operation
  that it comes from, as JAX named it. overlaps: computation goes on meanwhile.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  group: int
  times: int = 1
  source: str = ''
  overlaps: bool = False

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
  return Program(text).collectives(devices)


class Program:
  """A compiled program's text by computation, and how often a run of it runs each.

  fused: computations that are parts of one operation, such as a fusion.
  """

  def __init__(self, text: str):
    self.computations, entry = _computations(text)
    self.times = _times(self.computations, entry)
    self.fused = {
      name for lines in self.computations.values() for line in lines if ' fusion(' in line
      for name in _CALLED.findall(line)
    }

  def lines(self) -> Iterator[tuple[str, str, int]]:
    """Yield (computation, line, how often it runs) of what runs at all."""
    for name, lines in self.computations.items():
      if times := self.times.get(name):
        yield from ((name, line, times) for line in lines)

  def collectives(self, devices: int) -> list[Collective]:
    """Return all of them, each once: TPUs' programs have one that overlaps with computation in
    several fusions, by one channel."""
    found, seen = [], set()
    for name, line, times in self.lines():
      if match := _LINE.match(line):
        channel = re.search(r'channel_id=(\d+)', line) if name in self.fused else None
        if channel and channel[1] in seen:
          continue
        one = _collective(match, line, devices, times)
        if channel:
          seen.add(channel[1])
          one = dataclasses.replace(one, overlaps=True)
        if name.startswith('all-reduce-scatter'):  # Whose result is cut within its fusion.
          one = dataclasses.replace(one, kind='reduce-scatter', overlaps=False)
        found.append(one)
    return found


def _collective(match: re.Match, line: str, devices: int, times: int) -> Collective:
  _, shape, kind, start, rest = match.groups()
  arrays = [(kind_, sizes(found)) for kind_, found in SHAPE.findall(shape)]
  if start and kind != 'all-reduce':  # (operands, results, ...): only arrays that are results.
    arrays = arrays[len(arrays) // 2 :] if kind == 'all-gather' else arrays[:1]
  group = _group(line, devices)
  if kind == 'reduce-scatter':  # The result is a part of the whole.
    arrays = [(kind_, (group, *sizes)) for kind_, sizes in arrays]
  source = SOURCE.search(rest)
  return Collective(
    kind, tuple(arrays), group, times, source.group(1) if source else '', bool(start)
  )


def sizes(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(',') if size)


def _group(line: str, devices: int) -> int:
  """Devices in a group: {{0,1},{2,3}}, [groups,size]<=[...], or axes of a mesh; none is all."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if listed:
    return len(listed.group(1).split(','))
  counted = re.search(r'replica_groups=\[([\d,]+)\]<=', line)
  if counted:
    return int(counted.group(1).split(',')[-1])
  named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)+)? \{(.*?)\}", line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
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
      inner = count * _trips(line, computations) if ' while(' in line else count
      called = _CALLED.findall(line)
      for group in _BRANCHES.findall(line):
        called += [part.strip().lstrip('%') for part in group.split(',') if part.strip()]
      for one in called:
        visit(one, inner)

  visit(entry, 1)
  return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """Return how often a loop runs: as it says, or else as its condition compares with one number."""
  if trips := _TRIPS.search(line):
    return int(trips[1])
  condition = re.search(r'condition=%?([\w.-]+)', line)
  text = '\n'.join(computations.get(condition[1], ())) if condition else ''
  numbers = re.findall(r' constant\((\d+)\)', text)
  return int(numbers[0]) if len(numbers) == 1 and 'direction=LT' in text else 1


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
  """Bytes that a device sends in a step, by kind; kinds that are not there are left out."""
  total: dict[str, float] = {}
  for one in collectives:
    total[one.kind] = total.get(one.kind, 0.0) + one.moved
  return {kind: round(total[kind]) for kind in KINDS if total.get(kind)}


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
    size = whole_bytes(leaf)
    if not _split(leaf):
      total['all-reduce'] += moved('all-reduce', size, math.prod(ways.values()))
      continue
    total['all-gather'] += 2 * moved('all-gather', size, ways['fsdp'])
    total['reduce-scatter'] += moved('reduce-scatter', size, ways['fsdp'])
    total['all-reduce'] += moved('all-reduce', size / ways['fsdp'], ways['data'])
  for leaf in frozen:
    if _split(leaf):
      total['all-gather'] += moved('all-gather', whole_bytes(leaf), ways['fsdp'])
  return {kind: round(size) for kind, size in total.items() if size}


def _split(leaf: Any) -> bool:
  return leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def whole_bytes(leaf: Any) -> int:
  """Return the bytes of an array or a shape, over all devices once."""
  return leaf.size * leaf.dtype.itemsize
