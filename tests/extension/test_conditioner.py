"""A conditioner from one file outside of the package, in place of the text encoder."""

import json

import numpy as np
from PIL import Image

from tests import tiny


def test_a_conditioner(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(
    parts, {'conditioners': {'letters': {'length': 6}}}, optimizer={'learning_rate': 1e-2},
    loop={'total_steps': 20, 'evaluate_samples': 0, 'checkpoint_every_steps': 20,
          'ema_halflife_images': 0.0},
  )
  workdir = trained_with(outside('conditioner'), values)
  images = {}
  for prompt in ('sun', 'moon'):
    out = tmp_path / prompt
    assert command('sample', '--workdir', workdir, '--prompt', prompt, '--out', out) == 0
    images[prompt] = np.asarray(Image.open(out / f'0000_{prompt}.png')).astype(int)
  assert np.abs(images['sun'] - images['moon']).max() > 0
  out = tmp_path / 'scores.json'
  arguments = ('--workdir', workdir, '--samples', 16, '--metrics', 'clip_score', '--out', out)
  assert command('evaluate', 'model', *arguments) == 0
  assert json.loads(out.read_text())['generated']
