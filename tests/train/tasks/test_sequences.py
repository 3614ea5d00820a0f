"""The denoising task where the data are sequences: learned, drawn, scored, exported, resumed."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.config import parse
from diffusion_jax.data.sources import open_data
from diffusion_jax.evaluation.sequences import spectrum_error
from diffusion_jax.pipelines.sequences import SequenceSpace, draw
from diffusion_jax.recipe import load_config
from tests import tiny

RECIPE = tiny.ROOT / 'configs' / 'notes' / 'sequences.py'
LENGTH = 32


def _values(**settings):
  values = load_config(str(RECIPE)).to_dict()
  values['settings'] |= settings
  values['settings']['denoiser'] |= {
    'sample_size': LENGTH // 4, 'num_layers': 1, 'num_attention_heads': 2, 'attention_head_dim': 16,
  }
  values['settings']['sample'] |= {'steps': 8}
  values['data']['size'] = LENGTH
  values['optimizer'] |= {'learning_rate': 5e-3, 'warmup_steps': 10, 'schedule': 'constant'}
  values['loop'] |= {
    'total_steps': 160, 'batch_size': 64, 'ema_halflife_images': 1000.0, 'log_every_steps': 80,
    'checkpoint_every_steps': 80, 'sample_every_steps': 0, 'evaluate_samples': 256,
  }
  return values


@pytest.fixture(scope='module')
def trained(tmp_path_factory, command):
  folder = tmp_path_factory.mktemp('sequences')
  config = tiny.write_config(folder / 'recipe.py', _values())
  assert command('train', '--config', config, '--workdir', folder / 'whole', '--quiet') == 0
  return folder


def test_the_spectrum_is_learned_and_a_resume_is_the_same(trained, command):
  """A flat spectrum, as noise has, is off by several decibels."""
  scores = json.loads((trained / 'whole' / 'scores.json').read_text())
  error = {name: scores[name]['spectrum_error'] for name in ('generated', 'untrained', 'real')}
  assert error['untrained'] > 5 and error['generated'] < error['untrained'] / 2
  assert error['real'] < 0.5
  assert scores['generated']['energy_distance'] < scores['untrained']['energy_distance'] / 2
  again = trained / 'again.json'
  arguments = ['--workdir', trained / 'whole', '--samples', 256, '--out', again]
  assert command('evaluate', 'model', *arguments) == 0
  found = json.loads(again.read_text())['generated']
  assert found == pytest.approx(scores['generated'], rel=1e-3)
  assert 'sequences (autoregressive, 32 places)' in (trained / 'whole' / 'README.md').read_text()
  tiny.check_going_on(command, trained / 'recipe.py', trained / 'whole', trained)


def test_numbers_are_drawn_beside_pictures_of_them(trained, command):
  """The export draws the run's, of any length of whole patches, and the pictures are of them."""
  out = {}
  for source in ('--workdir', '--model'):
    path = trained / 'whole' / ('model' if source == '--model' else '')
    folder = trained / f'drawn{source}'
    arguments = ['--prompt', '', '--prompt', '', '--out', folder]
    assert command('sample', source, path, *arguments) == 0
    out[source] = np.load(folder / 'values.npy')
  np.testing.assert_allclose(out['--model'], out['--workdir'], atol=0.05)  # It is in float16.
  assert out['--model'].shape == (2, LENGTH, 1) and out['--model'].std() > 0.3
  picture = np.asarray(Image.open(next(folder.glob('0001*.png'))))
  np.testing.assert_array_equal(picture, draw(out['--model'][1]))
  longer = ['--size', f'1x{2 * LENGTH}', '--prompt', '', '--out', trained / 'longer']
  assert command('sample', '--model', path, *longer) == 0
  assert np.load(trained / 'longer' / 'values.npy').shape == (1, 2 * LENGTH, 1)


def test_folding_into_patches_has_an_inverse():
  x = np.random.default_rng(0).standard_normal((3, 24, 2)).astype(np.float32)
  space = SequenceSpace(2, 4, plane=True)
  z = space.encode({}, x)
  assert z.shape == (3, *space.shape(1, 24))
  np.testing.assert_array_equal(z[1, 0, 2], x[1, 8:12].reshape(-1))
  np.testing.assert_array_equal(space.decode({}, z), x)
  pictures = space.drawn(x)
  assert pictures.shape == (3, 128, 128, 3) and len({p.tobytes() for p in pictures}) == 3


def test_the_error_of_a_spectrum_is_in_decibels():
  """Signals of twice the amplitude are 6.02 dB off at every frequency."""
  train, _ = open_data(parse(_values()).data)
  known = (np.abs(np.fft.rfft(train.values, axis=1)) ** 2).mean(axis=0) / LENGTH
  assert spectrum_error(2 * train.values, known) == pytest.approx(20 * np.log10(2), rel=1e-4)


@pytest.mark.parametrize(('changes', 'said'), [
  ({'data': {'dataset': 'moons'}}, 'holds no sequences'),
  ({'data': {'size': LENGTH + 2}}, 'multiples of 4 places'),
])
def test_what_cannot_be_is_one_sentence(tmp_path, command, capsys, changes, said):
  values = _values()
  for section, change in changes.items():
    values[section] |= change
  config = tiny.write_config(tmp_path / 'recipe.py', values)
  assert command('train', '--config', config, '--workdir', tmp_path / 'run', '--quiet') == 2
  assert said in capsys.readouterr().err
