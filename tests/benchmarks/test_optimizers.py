"""The comparison of optimizers: when its arms are scored, and how its table is written."""

import types

import pytest

from benchmarks import optimizers
from diffusion_jax.errors import UserError
from diffusion_jax.train.optimizer import OptimizerConfig


def _measured(loss):
  point = {'steps': 4, 'seconds': 2.0, 'loss': loss}
  return {
    'optimizer': {'learning_rate': 0.001}, 'step_seconds': {'median': 0.5}, 'steps': 4,
    'seconds': 1.0, 'optimizer_bytes': 800, 'parameters': 100, 'at_steps': point,
    'at_seconds': {**point, 'steps': 2},
  }


def test_an_arm_is_scored_after_its_steps_and_after_its_seconds(monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(optimizers, 'time', types.SimpleNamespace(perf_counter=lambda: next(clock)))
  given = []

  def update(state, batch):
    given.append(batch)
    return state + 1, {}

  found = optimizers.Arm(update, lambda state: 10 - state, 0).run(['a', 'b', 'c'], 5, 2.0)
  assert found['at_seconds'] == {'steps': 2, 'seconds': 2, 'loss': 8.0}
  assert found['at_steps'] == {'steps': 5, 'seconds': 5, 'loss': 5.0}
  assert given == ['a', 'b', 'c', 'a', 'b']


def test_the_table_stands_between_its_marks_and_arms_are_made_once():
  found = {'arms': {'muon': _measured(0.25), 'adamw': _measured(0.5)}}
  text = optimizers.table(found)
  lines = text.splitlines()
  assert lines[2].startswith('| adamw | 0.001 | 500 ms | 0.0 MB | 8.0 | 0.5000 | 0.5000 (2 steps)')
  assert lines[3].startswith('| muon')
  page = f'a\n{optimizers.BEGIN}\nold\n{optimizers.END}\nb\n'
  once = optimizers.replaced(page, text)
  assert text in once and 'old' not in once and once == optimizers.replaced(once, text)
  with pytest.raises(UserError, match='has no two lines'):
    optimizers.replaced('a', text)
  done = types.SimpleNamespace(steps=4, seconds=1.0)
  assert optimizers._is_done(found['arms']['muon'], done)
  assert not optimizers._is_done(found['arms']['muon'], types.SimpleNamespace(steps=5, seconds=1.0))
  assert not optimizers._is_done(None, done)


def test_each_arm_is_a_config():
  for name, keys in optimizers.ARMS.items():
    OptimizerConfig(**{'name': name.partition(',')[0], **optimizers.BASE, **keys})
