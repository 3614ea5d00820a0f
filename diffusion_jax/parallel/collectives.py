"""Bytes that the devices of a mesh send each other, read from the text of a compiled program.

They are those that a device sends in a ring of n devices, the least that is possible: of an array
of s bytes (n-1)/n s for all-gather, reduce-scatter and all-to-all, twice that for all-reduce and s
for collective-permute (Thakur et al. 2005).
"""

import dataclasses
import math
import re
from collections.abc import Iterable

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
