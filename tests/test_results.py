"""Results that no rebuilding may change: images of the packaged model, losses of the quickstart.

Both were recorded on a CPU by real commands. Images are equal to the bit under the version of JAX
that they were recorded with, and elsewhere within the rounding of another compiler.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny

REFERENCE = tiny.ROOT / 'tests' / 'reference'
RECORDED_WITH = '0.10.2'
PROMPTS = ('grinning cat', 'red apple', 'flag of Japan')
SETTINGS = {
  'as_exported': (),
  'ancestral': ('--sampler', 'euler_ancestral', '--steps', '7', '--guidance', '3', '--seed', '5'),
  'guided_between': (
    '--sampler', 'heun', '--steps', '4', '--guidance', '2.5', '--guidance_rescale', '0.7',
    '--guidance_interval', '0.2', '5', '--negative', 'green',
  ),
}


def _run(*arguments, data=''):
  """A command in a process of its own, compiled as users have it."""
  env = tiny.environment(data, devices=1, XLA_FLAGS='')
  done = subprocess.run(
    [sys.executable, '-m', 'diffusion_jax', *map(str, arguments)], env=env, cwd=tiny.ROOT,
    capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr


def _sampled(folder, settings):
  prompts = [part for prompt in PROMPTS for part in ('--prompt', prompt)]
  _run('sample', *prompts, *SETTINGS[settings], '--out', folder)
  files = sorted(folder.glob('0*.png'))
  assert len(files) == len(PROMPTS)
  return np.stack([np.asarray(Image.open(file).convert('RGB')) for file in files])


@pytest.mark.parametrize('settings', SETTINGS)
def test_the_packaged_model_samples_what_it_sampled(tmp_path, settings):
  images = _sampled(tmp_path, settings)
  recorded = np.asarray(Image.open(REFERENCE / f'{settings}.png')).reshape(images.shape)
  if jax.__version__ == RECORDED_WITH:
    digests = [hashlib.sha256(x.tobytes()).hexdigest() for x in (images, recorded)]
    assert digests[0] == digests[1]
  assert np.abs(images.astype(int) - recorded).mean() < 0.5


@pytest.fixture(scope='module')
def half_sized_data(once):
  """Root of every twelfth OpenMoji at the size of the quickstart."""

  def make(folder):
    from diffusion_jax.data.sources.openmoji import builder
    from diffusion_jax.data.sources.tfds import prepare_dataset

    every = builder.drawings
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(builder, 'drawings', lambda: itertools.islice(every(), 0, None, 12))
      prepare_dataset('openmoji', 64, str(folder))

  return str(once('half_sized_data', make))


def _losses(run, data):
  """The loss of each of the first 20 steps of the quickstart."""
  _run(
    'train', '--config', 'openmoji/quickstart', '--workdir', run, '--quiet',
    '--config.loop.total_steps=20', '--config.loop.log_every_steps=1',
    '--config.loop.evaluate_samples=0', '--config.loop.sample_every_steps=1000', data=data,
  )
  lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return [line['loss'] for line in lines if 'loss' in line and line.get('split') != 'test']


@pytest.mark.slow
def test_the_quickstart_has_the_losses_that_it_had(tmp_path, half_sized_data):
  losses = _losses(tmp_path / 'run', half_sized_data)
  recorded = json.loads((REFERENCE / 'quickstart_losses.json').read_text())
  assert len(losses) == 20
  np.testing.assert_allclose(losses, recorded, rtol=1e-5)


def record(folder):  # python -m tests.test_results FOLDER_OF_DATA
  """Record anew, after a change that is meant to change results."""
  REFERENCE.mkdir(exist_ok=True)
  for settings in SETTINGS:
    images = _sampled(folder / settings, settings)
    Image.fromarray(images.reshape(-1, *images.shape[2:])).save(REFERENCE / f'{settings}.png')
  losses = _losses(folder / 'run', os.environ['DIFFUSION_JAX_DATA'])
  (REFERENCE / 'quickstart_losses.json').write_text(json.dumps(losses, indent=1) + '\n')


if __name__ == '__main__':
  import tempfile
  from pathlib import Path

  record(Path(tempfile.mkdtemp()))
