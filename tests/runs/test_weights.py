"""Runs that begin with the weights of another, and which of its steps a run keeps."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny

LOOP = {'total_steps': 8, 'checkpoint_every_steps': 2, 'evaluate_every_steps': 2,
        'keep_checkpoints': 1, 'keep_best': 'energy_distance', 'evaluate_samples': 64}
MODEL = 'model/diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def first(once, command):
  """Workdir of a finished toy run."""

  def make(folder):
    values = tiny.toy_config(loop=LOOP, optimizer={'learning_rate': 0.1})
    config = tiny.write_config(folder / 'recipe.py', values)
    assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet') == 0

  return once('continued', make) / 'run'


def test_the_last_and_the_best_step_are_kept(first):
  distances = {
    step: line['energy_distance'] for step, line in tiny.metrics(first, 'evaluation').items()
  }
  assert sorted(distances) == [2, 4, 6, 8]
  best = min(distances, key=distances.get)
  kept = {int(path.name) for path in (first / 'checkpoints').iterdir() if path.is_dir()}
  assert kept == {best, 8}


def test_a_run_begins_with_the_averages_of_another(first, command, tmp_path):
  """At a learning rate of zero they are also what it ends with."""
  values = tiny.toy_config(optimizer={'learning_rate': 0.0}, loop={'evaluate_samples': 0})
  values['weights_from'] = str(first)
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  before = tiny.snapshot(first)
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  assert tiny.snapshot(first) == before
  wanted, found = load_file(first / MODEL), load_file(run / MODEL)
  assert wanted.keys() == found.keys()
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert json.loads((run / 'status.json').read_text())['step'] == 4


@pytest.mark.parametrize(('settings', 'start', 'words'), [
  ({'width': 8}, None, 'another model'), ({}, 'nowhere', 'nowhere has no config.json'),
])
def test_weights_that_do_not_fit(first, fails, tmp_path, settings, start, words):
  values = {**tiny.toy_config(settings), 'weights_from': start or str(first)}
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert words in fails('train', '--config', config, '--workdir', run)
  assert not run.exists()
