"""A denoiser from one file outside of the package: trained, sampled, scored and exported."""

import json

import numpy as np
from PIL import Image

from tests import tiny


def test_a_network(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(parts, {
    'denoiser': {'type': 'small', 'in_channels': 16, 'out_channels': 16, 'text_width': 16},
  }, loop={'evaluate_samples': 0})
  del values['settings']['unet']
  workdir = trained_with(outside('network'), values)
  assert json.loads((workdir / 'config.json').read_text())['settings']['denoiser']['width'] == 8
  images = []
  for place in (('--workdir', workdir), ('--model', workdir / 'model')):
    out = tmp_path / place[0].strip('-')
    assert command('sample', *place, '--prompt', 'sun', '--out', out) == 0
    images.append(np.asarray(Image.open(out / '0000_sun.png')).astype(int))
  assert images[0].shape == (tiny.SIZE, tiny.SIZE, 3)
  assert np.abs(images[0] - images[1]).max() <= 1
  out = tmp_path / 'scores.json'
  arguments = ('--workdir', workdir, '--samples', 16, '--metrics', 'clip_score', '--out', out)
  assert command('evaluate', 'model', *arguments) == 0
  assert json.loads(out.read_text())['generated']
