"""Reads what else a compiled program's text says: kernels, and cycles that a compiler expects."""

import collections
import dataclasses
import math
import re

from diffusion_jax.parallel.collectives import SHAPE, SOURCE, Program, sizes

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KIND = re.compile(r' = .*? ([a-z][a-z-]*)\(')
_KERNEL = re.compile(r' custom-call\(.*custom_call_target="([\w$.]+)"')
_PRODUCTS = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}
TPU_KERNEL = 'tpu_custom_call'


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A call of one. operands: shapes of its arguments; times: how often a step runs it."""

  name: str
  operands: tuple[tuple[int, ...], ...]
  times: int = 1

  @property
  def flops(self) -> float | None:
    """Of all its runs in a step, by formula, None where it is not known.

    Splash attention of q [.. n w] and k [.. l w] has two products of 2 n l w forward; for the
    gradients of keys and values four, of queries three, as both make the weights anew.
    """
    products = next((count for part, count in _PRODUCTS.items() if part in self.name), 0)
    arrays = [shape for shape in self.operands if len(shape) > 3 or shape[-1:] > (1,)]
    if not products or len(arrays) < 2:
      return None
    q, k = arrays[:2]
    return self.times * products * 2.0 * math.prod(q) * k[-2]


def cycles_of(program: Program) -> tuple[collections.Counter, collections.Counter]:
  """Return cycles that a TPU's compiler expects in a run, by operation and by source.

  Kernels have none, nor do collectives.
  """
  operations, sources = collections.Counter(), collections.Counter()
  for name, line, times in program.lines():
    found = _CYCLES.search(line)
    if found and name not in program.fused and ' while(' not in line:
      cycles, kind, source = times * int(found[1]), _KIND.search(line), SOURCE.search(line)
      operations[kind[1] if kind else '?'] += cycles
      sources[_place(source[1]) if source else '?'] += cycles
  return operations, sources


def kernels_of(program: Program) -> list[Kernel]:
  """Return programs within the program that its compiler did not make: ours, and libraries'."""
  found = []
  for _, line, times in program.lines():
    match = _KERNEL.search(line)
    # Others are the compiler's own, such as for memory.
    if match and (match[1] == TPU_KERNEL or match[1].startswith('__')):
      name = re.match(r'\s*(?:ROOT )?%?([\w.-]+?)(?:\.\d+)* = ', line)
      name = name[1] if match[1] == TPU_KERNEL and name else match[1]
      shapes = re.search(r'operand_layout_constraints=\{(.*?\})\}', line)
      arrays = SHAPE.findall(shapes[1]) if shapes else []
      found.append(Kernel(name, tuple(sizes(text) for _, text in arrays), times))
  return found


def _place(source: str) -> str:
  """Return where in the networks an operation comes from, without numbers and transformations."""
  own = lambda part: not re.match(r'p?jit|while|body|closed', part)
  parts = list(filter(own, source.split('/')))
  return re.sub(r'\d+', '', '/'.join(parts[-2:]))
