"""Packages that a task does not need may be missing, and are not imported."""

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.tiny import ROOT

SCRIPT = """
import json, sys
missing = json.loads(sys.argv[1])

class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in missing:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Missing())
from diffusion_jax.__main__ import main
code = main(sys.argv[2:])
print('imported', json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))
sys.exit(code)
"""
MISSING = ['tensorboardX', 'tensorboard', 'wandb', 'transformers', 'tokenizers', 'torch']


def _run(*arguments):
  return subprocess.run(
    [sys.executable, '-c', SCRIPT, json.dumps(MISSING), *map(str, arguments)], cwd=ROOT, text=True,
    capture_output=True, timeout=300,
  )


@pytest.mark.slow
def test_a_toy_trains_without_tensorboard_wandb_and_transformers(tmp_path):
  run = tmp_path / 'run'
  done = _run(
    'train', '--config', 'configs/toy/edm.py', '--workdir', run, '--quiet',
    '--config.loop.total_steps=3', '--config.loop.batch_size=64', '--config.loop.log_every_steps=1',
    '--config.loop.evaluate_samples=0', '--config.settings.sample.steps=2',
  )
  assert done.returncode == 0, done.stderr
  assert 'TensorBoard events are not written; for them, pip install tensorboardX' in done.stderr
  assert sorted(tiny.metrics(run)) == [1, 2, 3]
  assert json.loads((run / 'status.json').read_text())['state'] == 'finished'
  imported = json.loads(done.stdout.rpartition('imported ')[2])
  assert not {*MISSING, 'diffrax', 'tensorflow_datasets'} & set(imported)


@pytest.mark.slow
def test_what_needs_transformers_says_so(tmp_path):
  done = _run('sample', '--prompt', 'cat', '--out', tmp_path / 'out')
  assert done.returncode == 2 and not (tmp_path / 'out').exists()
  line, = done.stderr.splitlines()
  assert 'texts need the package transformers' in line and "pip install 'transformers>=5'" in line
