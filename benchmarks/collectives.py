"""Bytes that the devices of a mesh send each other in a step, beside what they need at least.

Those are read from the compiled program (`diffusion_jax.parallel.collectives`); these follow from
the shapes of the parameters, by a formula for data parallelism and FSDP.
"""

import math
from typing import Any

import jax

from diffusion_jax.parallel.collectives import (
  Collective,
  by_kind,
  formula,
  read_collectives,
  whole_bytes,
)
from diffusion_jax.planning.flops import read_arguments
from diffusion_jax.train.compile import abstract_arguments
from diffusion_jax.train.training import Training

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
    step, (abstract, frozen, batch) = abstract_arguments(t)
    text = step.lower(abstract, frozen, batch).compile().as_text()
    read = read_arguments(lambda frozen: _loss(t, abstract, frozen, batch), frozen)
  found = read_collectives(text, mesh.size)
  return {
    'batch_size': t.loop.batch_size,
    'parameter_bytes': sum(whole_bytes(leaf) for leaf in abstract.params.values()),
    'moved_bytes': by_kind(found),
    'formula_bytes': formula(abstract.params, read, mesh),
    'beside_parameters': beside_parameters(found, [abstract.params, *read]),
    'counts': _counts(found),
  }


def _loss(training: Training, state: Any, frozen: dict, batch: dict) -> jax.Array:
  zeros = lambda tree: jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), tree)
  params, carry, batch = zeros(state.params), zeros(state.carry), zeros(batch)
  return training.task.loss(params, frozen, carry, batch, jax.random.key(0), 0)[0]


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
