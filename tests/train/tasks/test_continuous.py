"""Latents are trained on any process in continuous time, and sampled, exported and scored on it."""


import numpy as np
import pytest
from PIL import Image

from diffusion_jax.pipelines.directory import load_model
from tests import tiny

HEUN = {'sampler': 'heun', 'steps': 2, 'guidance': 2.0}
CASES = {
  'flow': (
    {'process': 'flow', 'process_options': {'shift': 3.0}, 'label': 'sigma'},
    {'prediction': 'flow_prediction', 'times': 'logit_normal'}, HEUN,
  ),
  'edm': (
    {'process': 'karras', 'label': 'log_snr'},
    {'prediction': 'edm', 'weighting': 'edm', 'times': 'log_normal'}, HEUN | {'spacing': 'karras'},
  ),
  'vp': ({'process': 'linear'}, {'prediction': 'v_prediction', 'loss': 'vdm'}, HEUN),
}


@pytest.mark.parametrize('name', CASES)
def test_a_run_on_a_process(name, parts, small_data, command, tmp_path):
  schedule, objective, sample = CASES[name]
  values = tiny.diffusion_config(
    parts, {'schedule': schedule, 'objective': objective, 'sample': sample}, loop={'total_steps': 2}
  )
  config, run = tiny.write_config(tmp_path / 'recipe.py', values), tmp_path / 'run'
  assert command('train', '--config', config, '--workdir', run, '--quiet') == 0
  assert np.isfinite([line['loss'] for line in tiny.metrics(run).values() if 'loss' in line]).all()
  model, _, settings = load_model(str(run / 'model'))
  assert model.noise.table is None and model.noise.config.process == schedule['process']
  assert model.parameterization.name == objective['prediction']
  numbers = settings.numbers(model.noise)
  start = np.hypot(*(float(part[0]) for part in numbers.grid))
  np.testing.assert_allclose(numbers.start, start, rtol=1e-6)
  out = [tmp_path / 'a', tmp_path / 'b']
  for source, place in zip((('--workdir', run), ('--model', run / 'model')), out, strict=True):
    assert command('sample', *source, '--prompt', 'red apple', '--out', place) == 0
  a, b = (np.asarray(Image.open(next(place.glob('0000*')))) for place in out)
  np.testing.assert_array_equal(a, b)
