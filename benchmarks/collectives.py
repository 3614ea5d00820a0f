"""Bytes that the devices of a mesh send each other in a step, beside what they need at least.

Those are read from the compiled program (`diffusion_jax.parallel.collectives`); these follow from
the shapes of the parameters, by a formula for data parallelism and FSDP.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion_jax.parallel.collectives import Collective, by_kind, moved, read_collectives
from diffusion_jax.planning.flops import read_arguments
from diffusion_jax.train.compile import abstract_arguments
from diffusion_jax.train.training import Training
from diffusion_jax.types import Params

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
    'parameter_bytes': sum(_bytes(leaf) for leaf in abstract.params.values()),
    'moved_bytes': by_kind(found),
    'formula_bytes': formula(abstract.params, read, mesh),
    'beside_parameters': beside_parameters(found, [abstract.params, *read]),
    'counts': _counts(found),
  }


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
