"""The training step of a config, compiled for devices that need not be here, and what it needs."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.backend.xla import chip
from diffusion_jax.build import build_shapes
from diffusion_jax.models.attention import choose
from diffusion_jax.parallel.collectives import Collective, Program
from diffusion_jax.planning.flops import AttentionShape, step_attentions, step_flops
from diffusion_jax.planning.hlo import cycles_of, kernels_of
from diffusion_jax.planning.targets import Target
from diffusion_jax.planning.unread import with_model
from diffusion_jax.train.compile import abstract_arguments, batch_of, compile_step, held

SOURCES = 12
"""Places in the networks that take most of the time, as far as they are reported."""


def compile_for(config: dict[str, Any], target: Target) -> dict[str, Any]:
  """Compile the step of a config for a target, of the largest of its sizes; return what JSON takes.

  Nothing is allocated, no data and no weights are read. Figures are of one device, in bytes and
  FLOPs, where not named otherwise. UserError: the config does not fit the target; JaxRuntimeError:
  the compiler refuses it.
  """
  start = time.perf_counter()
  devices = target.devices()
  with with_model(config) as complete:
    t = build_shapes(complete, devices)
  mesh = t.mesh
  with jax.set_mesh(mesh):
    step, (state, frozen, batch) = abstract_arguments(t)
    buckets = t.loader.buckets_until(t.loop.total_steps)
    if len(buckets) > 1:
      batch = max((batch_of(t, bucket) for bucket in buckets), key=held)
    flops = step_flops(t.task, state, frozen, batch)
    attentions = step_attentions(t.task, state, frozen, batch)
    ways = _ways(attentions, t.config['attention'])
    traced = time.perf_counter() - start
    compiled, report = compile_step(step, state, frozen, batch)
  return {
    'target': str(target), 'devices': mesh.size, 'device': mesh.devices.flat[0].device_kind,
    'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
    'programs': len(buckets), 'trace_seconds': round(traced, 1),
    'step': report.as_json(), 'batch_size': t.loop.batch_size, 'steps': t.loop.total_steps,
    'accumulation_steps': t.loop.accumulation_steps, 'dtype': t.config['dtype'],
    'remat': t.config['remat'], 'attention': ways, 'model_flops': flops.total / mesh.size,
    'uncounted': sorted(flops.unseen), **_read(compiled, mesh.size),
  }


def _read(compiled: Any, devices: int) -> dict[str, Any]:
  """Return what a compiled program says of itself."""
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
  program = Program(compiled.as_text())
  operations, sources = cycles_of(program)
  kernels: dict[str, dict[str, Any]] = {}
  for kernel in kernels_of(program):
    row = kernels.setdefault(kernel.name, {'calls': 0, 'flops': 0.0})
    row['calls'] += kernel.times
    known = row['flops'] is not None and kernel.flops is not None
    row['flops'] = row['flops'] + kernel.flops if known else None
  return {
    'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes, 'code': memory.generated_code_size_in_bytes,
    'accessed': max(costs.get('bytes accessed', 0.0), 0.0),
    'collectives': _collectives(program.collectives(devices)), 'kernels': kernels,
    'cycles': operations.total(), 'cycles_by_operation': dict(operations.most_common(SOURCES)),
    'cycles_by_source': dict(sources.most_common(SOURCES)),
  }


def _collectives(found: list[Collective]) -> dict[str, dict[str, float]]:
  """Return by kind: how many, bytes that a device sends, and of these the ones meanwhile computed.
  """
  out: dict[str, dict[str, float]] = {}
  for one in found:
    row = out.setdefault(one.kind, {'count': 0, 'bytes': 0, 'overlapping_bytes': 0})
    row['count'] += one.times
    row['bytes'] += round(one.moved)
    row['overlapping_bytes'] += round(one.moved) if one.overlaps else 0
  return out


def _ways(found: dict[AttentionShape, int], attention: str) -> list[dict[str, Any]]:
  """Return shapes of attentions with the way of each on the mesh in force; frozen networks choose
  for themselves, which is not told apart here."""
  def way(shape: AttentionShape) -> str:
    if shape.masked:
      return 'xla'
    if attention != 'auto':
      return attention
    return choose(*chip(), jnp.dtype(shape.dtype), shape.n, shape.keys, shape.d)

  return [
    {**shape._asdict(), 'count': count, 'way': way(shape)} for shape, count in found.items()
  ]
