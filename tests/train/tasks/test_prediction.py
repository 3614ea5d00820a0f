"""Fine-tuning to another prediction: what training begins with, draws, writes and goes on with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.diffusion.conversion import Converted
from diffusion_jax.diffusion.noise import NoiseConfig
from diffusion_jax.pipelines.adapters import add_lora
from diffusion_jax.pipelines.directory import load_model
from diffusion_jax.types import Condition
from tests import tiny

WANTED = {
  'sd15_v': ('v_prediction', NoiseConfig(rescale_betas_zero_snr=True)),
  'sd15_flow': ('flow_prediction', NoiseConfig(process='flow', label='sigma')),
}


def denoised(model, weights, ratio):
  """D(x, alpha, sigma) of x [2 h w c] at unit deviation, at levels of these ratios [n]."""
  x = np.random.default_rng(3).normal(size=(2, *model.space.shape(*model.trained_size)))
  text = np.random.default_rng(4).normal(size=(2, model.text.length, model.text.width))
  norm = (1 + ratio) if model.noise.config.process == 'flow' else np.hypot(1, ratio)
  told = Condition(jnp.asarray(text, jnp.float32))
  denoise = jax.jit(lambda x, a, s: model.denoise(weights)(x, a, s, told))
  levels = zip(np.float32(1 / norm), np.float32(ratio / norm), strict=True)
  return np.stack([denoise(np.float32(x) * np.hypot(a, s), a, s) for a, s in levels])


@pytest.mark.parametrize('recipe', WANTED)
def test_training_begins_with_the_same_model_and_its_pictures_last(
  recipe, tuned, pipelines, command, tmp_path
):
  """The same denoiser at every ratio that both know; what is written draws what the run does."""
  model, weights, _ = load_model(str(pipelines / 'sd'))
  ratio = np.geomspace(0.03, 14, 6)
  before = denoised(model, weights, ratio)
  after = denoised(model.in_terms(*WANTED[recipe]), weights, ratio)
  np.testing.assert_allclose(after, before, rtol=0, atol=2e-3 * np.abs(before).max())
  raw = denoised(model.in_terms(*WANTED[recipe], exact=False), weights, ratio)
  assert np.abs(raw - before).max() > 0.1 * np.abs(before).max()

  run = tuned(recipe)
  losses = [row['loss'] for row in tiny.metrics(run).values() if 'loss' in row]
  assert len(losses) == 4 and np.isfinite(losses).all()
  made, params, sample = load_model(str(run / 'model'))
  assert (made.parameterization.name, made.noise.config) == WANTED[recipe]
  assert made.network_terms == (model.parameterization.name, model.noise.config)
  assert sample.steps == 2 and made.parameterization.own == model.parameterization
  moved = [np.abs(value - weights['denoiser'][n]).max() for n, value in params['denoiser'].items()]
  assert min(moved) > 0
  pictures = []
  for name, where in (('run', run), ('model', run / 'model')):
    out = tmp_path / name
    option = '--workdir' if name == 'run' else '--model'
    assert command('sample', option, where, '--out', out, '--prompt', 'a cat', '--seed', '3') == 0
    pictures.append(np.asarray(Image.open(out / 'grid.png')))
  np.testing.assert_array_equal(*pictures)
  assert pictures[0].std() > 1


def test_going_on_after_a_stop_is_exact(tuned, resumed):
  wanted, found = (tiny.snapshot(run('sd15_v') / 'model') for run in (tuned, resumed))
  assert found.keys() == wanted.keys()
  assert not [n for n in wanted if n != 'README.md' and found[n] != wanted[n]]


def test_an_exported_model_is_trained_on(tuned, arguments, command, tmp_path, capsys):
  """What was converted stays so under the same settings, and is converted anew under others, which
  is said."""
  source = tuned('sd15_v') / 'model'
  for number, recipe in enumerate(('sd15_v', 'sd15_flow')):
    run = tmp_path / str(number)
    changes = {'settings.model': source, 'loop.total_steps': 1, 'loop.sample_every_steps': 1}
    file, more = arguments(recipe, run, **changes)
    assert command('train', '--config', file, '--workdir', run, '--quiet', *more) == 0
    said = 'it is converted to flow_prediction' in capsys.readouterr().err
    assert said == (recipe == 'sd15_flow')
    model = load_model(str(run / 'model'))[0]
    assert (model.parameterization.name, model.noise.config) == WANTED[recipe]
    assert isinstance(model.parameterization, Converted)
    assert model.network_terms == ('epsilon', NoiseConfig())
    assert [*run.rglob('*.png')]  # A preview.


def test_adapters_of_a_converted_model_are_those_of_the_original(
  pipelines, arguments, command, tmp_path
):
  file, more = arguments('lora', tmp_path / 'run', **{
    'settings.objective.prediction': 'v_prediction', 'loop.total_steps': 2,
    'settings.schedule.rescale_betas_zero_snr': True, 'settings.sample.spacing': 'trailing',
  })
  assert command('train', '--config', file, '--workdir', tmp_path / 'run', '--quiet', *more) == 0
  model, weights, _ = load_model(str(pipelines / 'sd'))
  merged, ratio = add_lora(model, weights, str(tmp_path / 'run' / 'model')), np.array([0.1, 5.0])
  before = denoised(model, merged, ratio)
  after = denoised(model.in_terms(*WANTED['sd15_v']), merged, ratio)
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-3 * np.abs(before).max())
  assert np.abs(before - denoised(model, weights, ratio)).max() > 1e-3 * np.abs(before).max()
