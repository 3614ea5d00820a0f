"""Plans: the program is train's own, chips that are not here, what fails, what is kept."""

import dataclasses
import json

import jax
import pytest

from diffusion_jax.build import build, build_shapes
from diffusion_jax.config import parse, untyped
from diffusion_jax.formats.pipeline import read_pipeline
from diffusion_jax.parallel.collectives import Program
from diffusion_jax.parallel.mesh import put_batch, put_params
from diffusion_jax.planning import plan as planning
from diffusion_jax.planning.chips import NAMED
from diffusion_jax.planning.estimate import BOUND, COMPILER, estimate
from diffusion_jax.planning.hlo import cycles_of, kernels_of
from diffusion_jax.planning.plan import fingerprint, make_plan
from diffusion_jax.planning.targets import Target, plugin_versions, sentence
from diffusion_jax.planning.unread import with_model, write_configs
from diffusion_jax.planning.words import page_row, plan_lines, table
from diffusion_jax.recipe import load_config
from diffusion_jax.train.compile import abstract_arguments, compile_step, held
from diffusion_jax.train.state import initializer
from diffusion_jax.viz.plan import bar
from tests import tiny

needs_libtpu = pytest.mark.skipif(
  not plugin_versions('tpu'), reason="no libtpu: pip install 'jax[tpu]'"
)


def _toy(**sections):
  config = untyped(parse(load_config('toy/edm')))
  return {name: {**value, **sections[name]} if name in sections else value
          for name, value in config.items()}


def test_the_program_is_the_one_that_train_runs(finished, tmp_path, command, capsys):
  """Memory and FLOPs are those that the run wrote into step.json; asking again compiles nothing."""
  out = tmp_path / 'plan.json'
  ask = ('plan', '--config', finished.parent / 'recipe.py', '--target', 'cpu:1',
         '--json', out, '--html', tmp_path / 'plan.html', '--cache', tmp_path / 'kept')
  assert command(*ask) == 0
  assert 'compiled in' in capsys.readouterr().out
  (row,) = json.loads(out.read_text())['plans']
  ran = json.loads((finished / 'step.json').read_text())
  same = ('parameters', 'devices', 'state', 'batch', 'temporary', 'flops', 'size', 'bytes')
  assert {name: row['step'][name] for name in same} == {name: ran[name] for name in same}
  assert f'temporary {ran["temporary"] / 1e9:,.3g} GB' in (tmp_path / 'plan.html').read_text()
  assert command(*ask) == 0 and 'kept from before' in capsys.readouterr().out


def test_state_on_many_devices_is_as_large_as_planned(tmp_path):
  """To the byte, with parameters split over fsdp; and the program is the one of real arrays."""
  config = _toy(mesh={'data': 2, 'fsdp': 2})
  planned = make_plan(config, Target.of('cpu:4'), tmp_path).facts
  with tiny.few_devices(4):
    t = build(config, str(tmp_path / 'run'))
  with jax.set_mesh(t.mesh):
    step, (abstract, _, _) = abstract_arguments(t)
    state = initializer(t.task, t.optimizer, 0, abstract)(t.start(t.mesh))
    frozen = {role: put_params(params, t.mesh) for role, params in t.task.frozen.items()}
    batch = put_batch({name: next(t.loader)[name] for name in t.task.batch_fields}, t.mesh)
    _, report = compile_step(step, state, frozen, batch)
  first = jax.devices()[0]
  real = sum(
    part.data.nbytes for leaf in jax.tree.leaves((state, frozen))
    for part in leaf.addressable_shards if part.device == first
  )
  assert planned['step']['state'] == real == report.state
  assert planned['step']['batch'] == held(batch)
  assert planned['step'] | {'seconds': 0} == report.as_json() | {'seconds': 0}
  assert planned['mesh'] == {'data': 2, 'fsdp': 2} and 'all-gather' in planned['collectives']


@pytest.mark.skipif(
  not plugin_versions('cuda'), reason="no compiler of GPUs: pip install 'jax[cuda13]'"
)
@pytest.mark.parametrize('target', ['h100:8x4', 'a100:8'])
def test_gpus_that_are_not_here(target, tmp_path):
  plan = make_plan(_toy(loop={'batch_size': 256}), Target.of(target), tmp_path)
  assert not plan.error and plan.target.name.upper() in plan.facts['device']
  assert plan.facts['devices'] == plan.facts['mesh']['data'] == plan.target.count
  assert plan.facts['collectives'].keys() == {'all-reduce'} and not plan.facts['kernels']
  assert plan.estimate.basis == BOUND and 0 < plan.estimate.mfu <= 1


def test_a_published_model_needs_no_weights():
  """A recipe that names an architecture and no model is planned from the configs of its parts."""
  config = untyped(parse(load_config('finetune/lora')))
  assert config['settings']['model'] == ''
  with with_model(config) as complete:
    t = build_shapes(complete, jax.devices()[:1])
  sizes = {role: sum(x.size for x in jax.tree.leaves(tree)) for role, tree in t.task.frozen.items()}
  assert sizes['denoiser'] == 859_520_964 and sizes['text_encoder'] == 123_060_480
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(t.task.frozen))
  assert t.loader.spec()['image'].shape == (config['loop']['batch_size'], 512, 512, 3)


def test_a_published_model_of_flows_needs_no_weights(tmp_path):
  write_configs('sd35_medium', tmp_path)
  found = read_pipeline(tmp_path).scheduler()
  assert (found.prediction, found.schedule.shift) == ('flow_prediction', 3.0)


@needs_libtpu
def test_a_tpu_slice_that_is_not_here(parts, tmp_path):
  """Attention follows the target, and cycles, kernels and collectives are read of its program."""
  values = tiny.diffusion_config(parts, mesh={'data': 1, 'fsdp': 4})
  config = untyped(parse({**values, 'attention': 'splash', 'dtype': 'bfloat16'}))
  plan = make_plan(config, Target.of('v5e:2x2'), tmp_path)
  assert not plan.error and plan.facts['device'] == 'TPU v5 lite' and plan.facts['devices'] == 4
  assert {one['way'] for one in plan.facts['attention']} == {'splash'}
  assert any(name.startswith('splash_mha_dq') for name in plan.facts['kernels'])
  assert plan.facts['cycles'] > 1e4 and plan.estimate.basis == COMPILER
  assert plan.estimate.step == pytest.approx(
    plan.facts['cycles'] / 1.5e9 + plan.estimate.kernels + plan.estimate.waiting
  )
  assert plan.facts['collectives']['all-gather']['bytes'] > 0
  on_cpu = build_shapes(config | {'attention': 'auto'}, Target.of('cpu:4').devices())
  with jax.set_mesh(on_cpu.mesh):
    _, (state, frozen, _) = abstract_arguments(on_cpu)
  assert plan.facts['step']['state'] == held((state, frozen))
  assert 'knows no v5e:3x9' in make_plan(config, Target.of('v5e:3x9'), tmp_path).error


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, fails, command, capsys):
  for text in ('v9e:2x2', 'v5e:4', 'h100', 'cpu:0', 'v5p:2x2'):
    assert text in fails('plan', '--config', 'toy/edm', '--target', text)
  assert 'no price' in fails('plan', '--config', 'toy/edm', '--target', 'cpu:1', '--price', 'much')
  monkeypatch.setattr('diffusion_jax.planning.targets.plugin_versions', lambda platform: {})
  asked = ('plan', '--config', 'toy/edm', '--target', 'v5e:2x2,h100:8,cpu:3,cpu:1',
           '--cache', tmp_path)
  assert command(*asked, devices=8) == 1
  out = capsys.readouterr().out
  assert f"pip install 'jax[tpu]=={jax.__version__}'" in out and "'jax[cuda13]" in out
  assert 'cannot be split over 3' in out and 'memory of a device' in out
  full = jax.errors.JaxRuntimeError(
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
    'Used 16.45G of 15.75G hbm. Exceeded hbm capacity by 715.64M.'
  )

  def refuse(config, target):
    raise full

  monkeypatch.setattr(planning, 'compile_for', refuse)
  refused = make_plan(_toy(loop={'total_steps': 7}), Target.of('cpu:1'), tmp_path)
  assert refused.error == 'out of memory: it needs 16.45G of a device that has 15.75G'
  # The compilers of GPUs do not refuse it.
  large = FACTS | {'step': FACTS['step'] | {'bytes': 90e9}}
  monkeypatch.setattr(planning, 'compile_for', lambda config, target: large)
  for _ in ('compiled', 'kept'):
    refused = make_plan(_toy(), Target.of('h100:1'), tmp_path)
    assert refused.error == 'out of memory: it needs 90 GB of a device that has 84.9 GB'
  assert sentence(ValueError('INTERNAL: Mosaic failed to compile. See the log.')) == (
    'Mosaic failed to compile'
  )


def test_a_plan_is_of_its_config_flags_parts_and_target(parts, tmp_path, monkeypatch):
  toy, target = _toy(), Target.of('cpu:1')
  seen = {
    fingerprint(toy, target), fingerprint(toy, Target.of('cpu:2')),
    fingerprint(_toy(loop={'batch_size': 7}), target),
  }
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_some_flag=true')
  seen.add(fingerprint(toy, target))
  assert len(seen) == 4 and fingerprint(toy, target) in seen
  part = tmp_path / 'part'
  part.mkdir()
  (part / 'config.json').write_text('{}')
  named = {**toy, 'settings': {'clip': str(part)}}
  before = fingerprint(named, target)
  (part / 'config.json').write_text('{"layers": 2}')
  assert fingerprint(named, target) != before


FACTS = {
  'target': 'v5e:2x2', 'devices': 4, 'device': 'TPU v5 lite', 'mesh': {'data': 4}, 'programs': 1,
  'batch_size': 32, 'steps': 9000, 'accumulation_steps': 1, 'dtype': 'bfloat16', 'remat': 'none',
  'attention': [], 'model_flops': 19.7e12, 'uncounted': [], 'arguments': 1e9, 'outputs': 1e9,
  'aliased': 1e9, 'code': 0,
  'accessed': 0.0, 'cycles': 300_000_000, 'cycles_by_source': {'down': 3}, 'collectives': {
    'all-reduce': {'count': 2, 'bytes': 40e9, 'overlapping_bytes': 20e9},
  }, 'kernels': {'splash_mha_fwd': {'calls': 1, 'flops': 9.85e12}}, 'step': {
    'state': 1e9, 'optimizer': 5e8, 'batch': 0, 'temporary': 1e9, 'bytes': 2e9,
    'flops': 39.4e12, 'seconds': 3.0,
  },
}


def test_times_by_hand():
  found = estimate(FACTS, NAMED['v5e'])
  assert found.basis == COMPILER and found.arithmetic == pytest.approx(0.2)
  assert found.computing == pytest.approx(0.2) and found.kernels == pytest.approx(0.05)
  assert found.network == pytest.approx(0.2) and found.waiting == pytest.approx(0.1)
  assert found.step == pytest.approx(0.35) and found.mfu == pytest.approx(0.1 / 0.35)
  assert found.chip_hours == pytest.approx(0.35 * 9000 * 4 / 3600)
  gpu = FACTS | {'target': 'h100:8x4', 'cycles': 0}
  found, within = estimate(gpu, NAMED['h100']), estimate(gpu | {'target': 'h100:8'}, NAMED['h100'])
  assert found.basis == BOUND and found.bounded_by == 'network' and found.step == pytest.approx(0.8)
  assert within.network == pytest.approx(0.8 / 9) and within.waiting == 0
  plan = planning.Plan(Target.of('v5e:2x2'), FACTS)
  lines = '\n'.join([*plan_lines(plan, 2.0), *table([plan], [2.0])])
  assert '14.9 GB of 16.9 GB are free' in lines and 'step: about 350 ms' in lines
  # Layouts of TPUs fill arrays up, and the program lies in the same memory.
  padded = planning.Plan(Target.of('v5e:2x2'), FACTS | {'arguments': 1.2e9, 'code': 1e8})
  assert padded.bytes == 2.3e9 and 'padding, results and code 0.3 GB' in plan_lines(padded)[1]
  row = page_row(plan)
  assert row.limit == pytest.approx(15.75 * 2**30 / 1e9) and sum(row.times.values()) == (
    pytest.approx(350)
  )
  assert bar({'<a>': 1.0, 'b': 3.0}, 8.0, 'GB').count('width="125.0"') == 1
  assert '&lt;a&gt; 1 GB' in bar({'<a>': 1.0}, 8.0, 'GB')
  assert '7.00 at 2 for one' in lines and 'splash_mha_fwd: 1 x, 9.85 TFLOP' in lines


TPU = """HloModule jit_step

%region_1.cond (p: (s32[], bf16[8])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %c = bf16[8]{0} copy(%x), backend_config={"estimated_cycles":"100"}
}

%start.1 (p: bf16[2]) -> bf16[8] {
  %g.1 = bf16[8]{0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}
}

%done.1 (p: bf16[2]) -> bf16[8] {
  %g.2 = bf16[8]{0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

ENTRY %main (p: bf16[2]) -> bf16[8] {
  %s = bf16[8]{0} fusion(%p), kind=kCustom, calls=%start.1, metadata={op_name="jit(f)/jvp(UNet)/down.0/conv_in/dot"}, backend_config={"estimated_cycles":"7"}
  %d = bf16[8]{0} fusion(%s), kind=kCustom, calls=%done.1
  %m.1 = bf16[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %splash_mha_dkv_no.1 = bf16[2,2,256,128]{3,2,1,0} custom-call(%d), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,2,256,128]{3,2,1,0}, bf16[2,2,512,128]{3,2,1,0}}
  ROOT %w = (s32[], bf16[8]) while(%t), condition=%region_1.cond, body=%body
}
"""  # noqa: E501


def test_a_tpus_program():
  program = Program(TPU)
  operations, sources = cycles_of(program)
  assert operations == {'copy': 500, 'fusion': 7} and sources['conv_in/dot'] == 7
  (gather,) = program.collectives(8)
  assert gather.group == 4 and gather.overlaps and gather.moved == 16 * 3 / 4
  (kernel,) = kernels_of(program)
  assert kernel.name == 'splash_mha_dkv_no'
  assert kernel.flops == 4 * 2 * (2 * 2 * 256 * 128) * 512
  assert dataclasses.replace(kernel, name='other').flops is None
