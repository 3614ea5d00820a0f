"""Collectives from a program's text: by hand, of small programs, and of a step."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.collectives import beside_parameters, step_collectives
from benchmarks.run import built
from diffusion_jax.config import parse, untyped
from diffusion_jax.parallel.collectives import Collective, by_kind, moved, read_collectives
from tests import tiny

TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = f32[8,4]{1,0} all-gather(f32[2,4]{1,0} %x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %g)
}

ENTRY %main (p0: f32[16]) -> f32[16] {
  %ar = (f32[16]{0}, bf16[3,2]{1,0}) all-reduce(f32[16] %p0, bf16[3,2] %q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="jit(step)/sum"}
  %w = (s32[], f32[8,4]) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2] %v), replica_groups=[1,8]<=[8], dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %rs = f32[4]{0} reduce-scatter(f32[32] %p0), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %cp = f32[16]{0} collective-permute(%p0), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_kinds_groups_loops_and_tuples():
  found = {one.kind + str(one.times): one for one in read_collectives(TEXT, 8)}
  assert found['all-reduce1'] == Collective(
    'all-reduce', (('f32', (16,)), ('bf16', (3, 2))), 4, 1, 'jit(step)/sum'
  )
  assert found['all-gather5'].arrays == (('f32', (8, 4)),) and found['all-gather5'].group == 4
  assert found['all-gather1'].arrays == (('f32', (16,)),)
  assert found['reduce-scatter1'].bytes == 32 * 4
  assert by_kind(found.values()) == {
    'all-gather': 5 * 128 * 3 // 4 + 64 * 7 // 8, 'reduce-scatter': 128 * 7 // 8,
    'all-reduce': 2 * (64 + 12) * 3 // 4, 'collective-permute': 64,
  }
  assert moved('all-reduce', 100, 1) == 0


def test_what_jax_compiles():
  """A product whose contraction is split is reduced; one with a split weight gathers it."""
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  put = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((8, 16), (16, 12))]

  def collectives(left, right):
    compiled = jax.jit(jnp.matmul, in_shardings=(left, right), out_shardings=put())
    return read_collectives(compiled.lower(*shapes).compile().as_text(), 4)

  (reduced,) = collectives(put(None, 'd'), put('d'))
  assert (reduced.kind, reduced.bytes, reduced.group) == ('all-reduce', 8 * 12 * 4, 4)
  assert collectives(put(), put()) == []
  assert {one.kind for one in collectives(put('d'), put('d'))} == {'all-gather'}


def test_what_is_beside_parameters():
  known = [jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)]
  one = lambda kind, *sizes: Collective(kind, (('f32', sizes),), 4)
  fine = [one('all-gather', 3, 3, 8, 16), one('all-reduce', 8, 16), one('all-reduce', 4)]
  assert beside_parameters(fine, known) == []
  bad = [one('all-gather', 32, 64), one('all-reduce', 2, 16, 16, 8), one('all-to-all', 8, 16)]
  assert len(beside_parameters(bad, known)) == 3


def test_the_formula_for_a_step_of_points(tmp_path):
  """Data parallelism all-reduces every gradient; FSDP moves three times what it splits."""
  found = {}
  for name, mesh in (('data', {'data': -1}), ('fsdp', {'data': 1, 'fsdp': -1})):
    values = untyped(parse(tiny.toy_config(mesh=mesh)))
    with tiny.few_devices(4):
      found[name] = step_collectives(built(values, tmp_path, synthetic=True))
  data, fsdp = found['data'], found['fsdp']
  whole = data['parameter_bytes']
  assert data['formula_bytes'] == {'all-reduce': 2 * whole * 3 // 4}
  assert data['beside_parameters'] == [] and data['moved_bytes'].keys() == {'all-reduce'}
  assert 0 <= data['moved_bytes']['all-reduce'] - data['formula_bytes']['all-reduce'] < 1000
  formula = fsdp['formula_bytes']
  assert formula['all-gather'] == 2 * formula['reduce-scatter']
  half = (formula['all-gather'] + formula['all-reduce']) / 2
  assert half == pytest.approx(0.75 * whole, abs=1)
  assert 0 < fsdp['moved_bytes']['all-gather']
