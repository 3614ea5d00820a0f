"""A sampler from one file outside of the package draws while training and after, by name."""

import json

import numpy as np
from PIL import Image

from tests import tiny


def test_a_sampler(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(
    parts, {'sample': {'sampler': 'straight', 'steps': 3, 'guidance': 2.0}},
    loop={'sample_every_steps': 2, 'total_steps': 2, 'evaluate_samples': 0},
  )
  workdir = trained_with(outside('sampler'), values)
  assert list((workdir / 'samples').glob('*.png'))
  images = {}
  for name in ('straight', 'ddim'):
    out = tmp_path / name
    sampler = () if name == 'straight' else ('--sampler', name)
    assert command('sample', '--workdir', workdir, '--prompt', 'sun', '--out', out, *sampler) == 0
    with Image.open(out / '0000_sun.png') as file:
      images[name] = np.asarray(file).astype(int)
      assert file.text['sampler'] == name
  assert np.abs(images['straight'] - images['ddim']).max() <= 2 and images['ddim'].std() > 1
  out = tmp_path / 'scores.json'
  assert command(
    'evaluate', 'model', '--workdir', workdir, '--samples', 16, '--sampler', 'straight',
    '--metrics', 'clip_score', '--out', out,
  ) == 0
  assert json.loads(out.read_text())['settings']['sampler'] == 'straight'
