"""A few steps of every task leave everything that a run directory must hold."""

import dataclasses
import importlib.metadata
import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.formats.networks import load_params
from diffusion_jax.models.text.tokenizer import load_tokenizer
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.train import compile, loop
from diffusion_jax.train.meter import Meter
from tests import tiny

LOSSES = {
  'autoencoder': ('loss_reconstruction', 'loss_kl', 'loss_generator', 'loss_discriminator'),
  'clip': ('retrieval_r1_of_8', 'logit_scale'),
  'diffusion': ('loss_by_timestep',),
}
COLUMNS = {
  'autoencoder': {'test'}, 'clip': {'test', 'untrained'},
  'diffusion': {'generated', 'real', 'untrained', 'warnings'},
}


@pytest.mark.parametrize('task', LOSSES)
def test_a_run_leaves_all_its_files(trained, task):
  run = trained(task)
  status = json.loads((run / 'status.json').read_text())
  assert (status['state'], status['step'], status['total_steps']) == ('finished', 4, 4)
  config = json.loads((run / 'config.json').read_text())
  assert config['task'] == task and config['optimizer']['b1'] == 0.9  # Defaults are written too.
  versions = json.loads((run / 'versions.json').read_text())
  assert versions['jax'] == importlib.metadata.version('jax') and versions['devices'] == 8
  lines = tiny.metrics(run)
  assert sorted(lines) == [1, 2, 3, 4]
  assert [lines[i]['recompilations'] for i in range(1, 5)] == [0] * 4
  for name in ('loss', 'gradient_norm', 'learning_rate', 'images_per_second', *LOSSES[task]):
    assert name in lines[4], name
  assert [lines[i]['learning_rate'] for i in (1, 2, 3)] == pytest.approx([5e-4, 1e-3, 1e-3])
  assert sorted(tiny.metrics(run, 'evaluation')) == [2, 4]
  steps = [path.name for path in (run / 'checkpoints').iterdir() if path.is_dir()]
  assert sorted(steps) == ['2', '4']
  grids = sorted((run / 'samples').iterdir())
  assert [grid.name for grid in grids] == ['step_00000002.png', 'step_00000004.png']
  image = Image.open(grids[1])
  assert image.text['step'] == '4' and min(image.size) >= tiny.SIZE and image.text['captions']
  events = [path.stat().st_size for path in (run / 'tensorboard').glob('events.*')]
  assert events and sum(events) > 1000
  scores = json.loads((run / 'scores.json').read_text())
  assert scores.keys() == COLUMNS[task] | {'settings', 'measured'}
  assert '<html' in (run / 'report.html').read_text()
  card = (run / 'README.md').read_text()
  assert 'Steps: 4 of 4, 32 images seen, batch 8' in card and 'CC BY-SA 4.0' in card
  assert (run / 'model' / 'README.md').read_text() == card


def test_a_quiet_run_says_only_where_its_results_lie(command, tmp_path, capfd):
  config = tiny.write_config(tmp_path / 'toy.py', tiny.toy_config(loop={'evaluate_samples': 0}))
  run = tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  report, model = run / 'report.html', run / 'model'
  last = capfd.readouterr().out.splitlines()[-1]
  assert last == f'finished: see {report}; the model is in {model}'
  assert report.exists() and model.exists()


def test_metrics_are_read_while_the_next_step_runs(command, tmp_path, monkeypatch):
  """So that no step waits for the metrics of the one before, nor the device for the host."""
  order = []

  def spy(owner, name, word):
    real = getattr(owner, name)
    told = lambda *args: (order.append(word), real(*args))[1]
    monkeypatch.setattr(owner, name, staticmethod(told))

  spy(loop, 'put_batch', 'step')
  spy(Meter, 'read', 'read')
  values = tiny.toy_config(loop={'checkpoint_every_steps': 4, 'evaluate_samples': 0})
  config = tiny.write_config(tmp_path / 'toy.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 0
  assert order[:7] == ['step', *['step', 'read'] * 3]


def test_losses_of_the_adversary_appear_at_its_step(trained):
  lines = tiny.metrics(trained('autoencoder'))
  assert [lines[step]['loss_discriminator'] is None for step in range(1, 5)] == [1, 1, 0, 0]


def test_the_exported_autoencoder_loads_and_gives_latents_unit_variance(trained):
  config, params = load_params('autoencoder', trained('autoencoder') / 'model')
  test = json.loads((trained('autoencoder') / 'scores.json').read_text())['test']
  assert config.scaling_factor == pytest.approx(1 / test['latent_std'], rel=1e-4)
  assert config.shift_factor == pytest.approx(test['latent_mean'], abs=1e-5)
  assert params and all(np.isfinite(value).all() for value in params.values())


def test_the_exported_clip_loads_with_its_tokenizer(trained):
  model = trained('clip') / 'model'
  config, params = load_params('clip', model)
  tokenizer = load_tokenizer(model)
  assert config.text_config.vocab_size == len(tokenizer)
  assert config.text_config.eos_token_id == tokenizer.eos_token_id
  assert params['text_model.embeddings.token_embedding.embedding'].shape[0] == len(tokenizer)


def test_the_exported_denoiser_loads_with_its_settings(trained, parts):
  model, weights, sample = load_model(str(trained('diffusion') / 'model'))
  assert model.parameterization.name == 'v_prediction' and model.noise.config.rescale_betas_zero_snr
  assert (sample.sampler, sample.steps, sample.guidance) == ('ddim', 2, 2.0)
  folded = dataclasses.replace(tiny.UNET, sample_size=8, in_channels=16, out_channels=16)
  assert model.denoiser.config == folded and model.space.patch == 2
  assert weights['denoiser'].keys() == model.denoiser.shapes.keys()
  _, wanted = load_params('autoencoder', parts['autoencoder'])
  for name, value in wanted.items():
    np.testing.assert_array_equal(weights['autoencoder'][name], value)


def test_on_cpus_no_step_is_called_while_another_runs(tmp_path, command, monkeypatch):
  """Else its temporary memory would come from a thread that cannot keep it (host_memory)."""
  compile_step, seen = compile.compile_step, []

  def watched(*args):
    step, report = compile_step(*args)

    def call(*args):
      seen.append(all(leaf.is_ready() for leaf in jax.tree.leaves(args[0])))
      return step(*args)

    return call, report

  monkeypatch.setattr(compile, 'compile_step', watched)
  values = tiny.toy_config(
    {'width': 256, 'depth': 2}, loop={'batch_size': 2048, 'evaluate_samples': 0},
  )
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  with tiny.few_devices():
    assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 0
  assert seen == [True] * 4
