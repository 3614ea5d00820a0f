"""One key, one use, in whole runs: `command` watches keys, so that most are watched elsewhere."""

import jax
import numpy as np
import pytest

from diffusion_jax import build
from diffusion_jax.diffusion import losses
from diffusion_jax.recipe import load_config
from tests import tiny

NOISY = {'offset_noise': 0.1, 'input_perturbation': 0.1}
TWO_STEPS = {'loop': {'total_steps': 2, 'accumulation_steps': 2}}


def _toy():
  return tiny.toy_config({
    'process': 'table', 'process_options': {}, 'likelihood_points': 8,
    'objective': {'loss': 'sliced', 'prediction': 'score', **NOISY},
    'sample': {'sampler': 'ddpm', 'steps': 2},
  }, **TWO_STEPS)


def _latents(parts):
  values = tiny.diffusion_config(parts, {
    'cache': False, 'objective': {'loss': 'sliced', 'prediction': 'v_prediction', **NOISY},
  }, **TWO_STEPS)
  values['data']['transforms'] = tiny.WITH_TEXT
  values['loop']['evaluate_samples'] = 0
  return values


@pytest.mark.parametrize('task', ['toy', 'diffusion'])
def test_the_sliced_loss_with_perturbed_inputs_trains(task, parts, small_data, command, tmp_path):
  values = _toy() if task == 'toy' else _latents(parts)
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 0
  lines = tiny.metrics(tmp_path / 'run')
  assert np.isfinite([lines[step]['loss'] for step in (1, 2)]).all()
  assert all(lines[step]['gradient_norm'] > 0 for step in (1, 2))


def test_a_key_that_is_used_twice_ends_a_run(command, tmp_path, monkeypatch):
  """What the tests of all tasks rely on."""
  twice = lambda key, shape, _: jax.random.normal(key, shape) + jax.random.normal(key, shape)
  monkeypatch.setattr(losses, 'offset_noise', twice)
  config = tiny.write_config(tmp_path / 'recipe.py', _toy())
  with pytest.raises(jax.errors.KeyReuseError):
    command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet')


def test_rows_of_a_new_word_are_drawn_apart(arguments, pipelines, command, tmp_path):
  """XL has two text encoders of one width here: their rows would be the same numbers."""
  config, more = arguments(
    'textual_inversion', tmp_path / 'run', **{'settings.model': pipelines / 'sdxl'}
  )
  with tiny.few_devices():
    task = build.build(load_config(config, more), str(tmp_path / 'run')).task
  first, second = jax.jit(task.initialize)(jax.random.key(0)).values()
  assert first.shape == second.shape and np.abs(first - second).max() > 1e-3
