"""The search over meshes: what may be, its order, and a made-up case whose best is known."""

import pytest

from diffusion_jax.config import parse, untyped
from diffusion_jax.errors import UserError
from diffusion_jax.planning import search as searching
from diffusion_jax.planning.chips import NAMED
from diffusion_jax.planning.plan import Plan
from diffusion_jax.planning.search import candidates, choose_best, search, search_lines
from diffusion_jax.planning.targets import Target
from diffusion_jax.recipe import load_config
from tests.planning.test_plan import FACTS


def test_candidates_split_devices_and_batch_evenly():
  found = list(candidates(8, 16))
  assert all(a * b * c * d == 8 and not (c > 1 and d > 1) for a, b, c, d in (x.mesh for x in found))
  assert all(x.examples * x.parts * x.mesh[0] * x.mesh[1] == 16 for x in found)
  assert {x.mesh[:2] for x in found if x.mesh[2:] == (1, 1)} == {(8, 1), (4, 2), (2, 4), (1, 8)}
  assert not list(candidates(8, 2)) or all(x.mesh[2] * x.mesh[3] >= 4 for x in candidates(8, 2))


def test_a_known_optimum(monkeypatch):
  """Data parallelism is the fastest, but its state does not fit; of FSDP more than four examples at
  a time do not; so accumulation in two parts wins over four, and over remat."""
  toy, target, asked = untyped(parse(load_config('toy/edm'))), Target.of('v5e:2x2'), []
  toy['loop']['batch_size'] = 32
  state = lambda x: int(40e9 / x.mesh[1])

  def predict(config, target, every):
    for x in every:
      longer = 1 + 0.01 * x.parts + 0.1 * x.mesh[1]
      x.state, x.seconds = state(x), searching.AGAIN[x.remat] * longer

  def compiled(config):
    sizes, parts = config['mesh'], config['loop']['accumulation_steps']
    examples = 32 // 4 // parts
    asked.append((sizes['data'], sizes['fsdp'], config['remat'], parts))
    if examples > (8 if config['remat'] == 'block' else 4):
      return Plan(target, error='out of memory')
    cycles = 3e8 * searching.AGAIN[config['remat']] * (1 + 0.01 * parts)
    return Plan(target, FACTS | {'cycles': cycles, 'collectives': {}, 'kernels': {}})

  monkeypatch.setattr(searching, '_predict', predict)
  found = search(toy, target, compiled, 2)
  best = found[0]
  assert best.keys() | {'mesh.spatial': 1} == {
    'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 1, 'mesh.spatial': 1, 'remat': 'none',
    'loop.accumulation_steps': 2,
  }
  assert asked[0] == (1, 4, 'none', 1) and len(asked) == 3  # Refused once, then two that fit.
  why = {(x.mesh, x.remat, x.parts): x.why for x in found}
  assert 'its state alone needs 40 GB' in why[(4, 1, 1, 1), 'none', 1]
  assert why[(1, 4, 1, 1), 'none', 4].endswith('times as long')
  assert why[(1, 4, 1, 1), 'block', 1] == 'not compiled: slower by formula'
  lines = search_lines(found)
  assert '--config.mesh.fsdp=4' in lines[0] and '--config.loop.accumulation_steps=2' in lines[0]
  # What needs no less than one that was refused is not tried.
  order = [searching.Choice((4 // n, n, 1, 1), 'none', 1, 8) for n in (1, 2)]
  none = choose_best(toy, order, NAMED['v5e'], lambda _: Plan(target, error='out of memory'), 1)
  assert [x.plan is None for x in none] == [False, True] and 'none of 2' in search_lines(none)[0]
  with pytest.raises(UserError, match='compares times'):
    search(toy, Target.of('cpu:2'), compiled, 1)


def test_order_is_by_the_shapes_of_the_model():
  """State is exact on each mesh: FSDP divides it; no program is compiled for that."""
  toy = untyped(parse(load_config('toy/edm')))
  every = list(candidates(4, toy['loop']['batch_size']))
  on_cpu = Target.of('cpu:4')
  target = type('Tpu', (), {
    'devices': lambda self: on_cpu.devices(), 'chip': NAMED['v5e'], 'count': 4,
  })()
  searching._predict(toy, target, every)
  state = {x.mesh: x.state for x in every}
  assert state[(1, 4, 1, 1)] < 0.5 * state[(4, 1, 1, 1)] and min(x.seconds for x in every) > 0
