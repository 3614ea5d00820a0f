"""A task from one file outside of the package: trained, shown, scored and exported by name."""

import json

import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.pixels import to_float
from tests import tiny


def test_a_task(outside, trained_with, command, sources):
  values = tiny.autoencoder_config(
    optimizer={'name': 'sgd', 'learning_rate': 0.45 * tiny.SIZE**2 * 3, 'warmup_steps': 0,
               'weight_decay': 0.0, 'clip_norm': 0.0},
    loop={'sample_every_steps': 20, 'evaluate_every_steps': 20, 'checkpoint_every_steps': 20,
          'total_steps': 40, 'batch_size': 64, 'ema_halflife_images': 0.0},
  ) | {'task': 'mean', 'settings': {'start': 0.5}}
  workdir = trained_with(outside('task'), values)
  mean = to_float(np.stack([record['image'] for record in sources[0]])).mean(0)
  found = load_file(workdir / 'model' / 'model.safetensors')['mean.bias']
  assert np.abs(found - mean).mean() < 0.1 < np.abs(0.5 - mean).mean()
  scores = json.loads((workdir / 'scores.json').read_text())
  assert 0 < scores['test']['mean_distance'] < 1
  assert (workdir / 'samples' / 'step_00000040.png').exists()
  assert 'Mean of images' in (workdir / 'README.md').read_text()
  assert command('report', '--workdir', workdir) == 0
  assert 'Mean distance' in (workdir / 'report.html').read_text()


def test_a_run_of_it_is_scored_by_evaluate(outside, trained_with, command, tmp_path):
  values = tiny.autoencoder_config() | {'task': 'mean', 'settings': {}}
  workdir = trained_with(outside('task'), values)
  out = tmp_path / 'scores.json'
  assert command('evaluate', 'model', '--workdir', workdir, '--out', out) == 0
  assert 0 < json.loads(out.read_text())['test']['mean_distance'] < 2
