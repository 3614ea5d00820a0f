"""verify makes steps of a run again to the bit, and names whatever was changed since."""

import json
import shutil

import pytest

from diffusion_jax import build
from diffusion_jax.diffusion.objective import Objective
from diffusion_jax.runs import run_card
from tests import tiny


@pytest.fixture(scope='module')
def finished(tmp_path_factory, command):
  """A run of four steps that was taken on to six, whose learning rates are those of each start."""
  folder = tmp_path_factory.mktemp('verify')
  values = tiny.toy_config(
    loop={'evaluate_samples': 0, 'keep_checkpoints': 3, 'ema_halflife_images': 0.0},
    optimizer={'schedule': 'cosine', 'warmup_steps': 0},
  )
  config = tiny.write_config(folder / 'toy.py', values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'fingerprint', lambda source: {'pictures': 'these'})
    for steps in (4, 6):
      assert command('train', '--config', config, '--workdir', folder / 'run', '--quiet',
                     f'--config.loop.total_steps={steps}') == 0
  return folder / 'run'


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(build, 'fingerprint', lambda source: {'pictures': 'these'})
  return shutil.copytree(finished, tmp_path / 'run')


def test_steps_are_made_again_to_the_bit(run, command, capsys):
  before = tiny.snapshot(run)
  assert command('verify', run, '--step', 4, '--steps', 2) == 0
  said = capsys.readouterr().out
  assert 'steps 5 to 6' in said and 'of 2 lines, parameters of 2 steps' in said
  assert command('verify', run, '--step', 2, '--steps', 2) == 0  # As the first start made them.
  assert 'steps 3 to 4' in capsys.readouterr().out and tiny.snapshot(run) == before
  card = json.loads((run / 'run_card.json').read_text())
  assert card['earlier'][0]['config']['loop']['total_steps'] == 4 and card['started_at_step'] == 4
  assert card['seeds'] == {'loop.seed': 0} and card['data']['training'] == {'pictures': 'these'}
  lines = [json.loads(line) for line in (run / 'digests.jsonl').read_text().splitlines()]
  assert card['finished'].items() >= {line['step']: line for line in lines}[6].items()
  assert command('verify', run, '--step', 3) == 2 and command('verify', run, '--steps', 9) == 2
  said = capsys.readouterr().err
  assert 'are of 2, 4.' in said and 'give 1 to 2' in said


def test_what_was_changed_is_named(run, command, capsys, monkeypatch):
  """Config, exported weights, what was recorded, code and the numbers it gives, and data."""

  def edit(name, was, now):
    data = (run / name).read_bytes()
    assert was in data
    (run / name).write_bytes(data.replace(was, now, 1))

  def named(*sentences):
    assert command('verify', run) == 1
    said = capsys.readouterr().out
    assert all(sentence in said for sentence in sentences), said
    assert said.count('differs: ') == len(sentences) and 'verified' not in said

  edit('config.json', b'"learning_rate": 0.001', b'"learning_rate": 0.002')
  config = 'config: optimizer.learning_rate was 0.001 and is now 0.002'
  (weights,) = (run / 'model').glob('*.safetensors')
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  named(config, f'weights: {weights.name} is not what it was')
  edit('config.json', b'"learning_rate": 0.002', b'"learning_rate": 0.001')
  data[-1] ^= 1
  weights.write_bytes(data)

  lines = (run / 'digests.jsonl').read_text().splitlines()
  with (run / 'digests.jsonl').open('a') as file:
    file.write('{"step": 4, "params": "0"}\n{"step": 4, "torn')
  named('the parameters at step 4 are not those of the training')
  (run / 'digests.jsonl').write_text('\n'.join(lines) + '\n')

  losses, digests = Objective.losses, run_card.code_digests()
  with monkeypatch.context() as patch:
    more = lambda self, *given: (
      found := losses(self, *given))._replace(loss=found.loss * (1 + 1e-6))
    patch.setattr(Objective, 'losses', more)
    patch.setattr(run_card, 'code_digests', lambda: digests | {'build.py': '0'})
    named('code: build.py is not what it was', 'loss at step 5 was', 'gradient_norm at step 5 was')
  with monkeypatch.context() as patch:
    patch.setattr(build, 'fingerprint', lambda source: {'pictures': 'others'})
    named('the pictures of the training data are not those')


def test_a_damaged_checkpoint_is_named(run, command, capsys):
  (largest,) = sorted((run / 'checkpoints' / '4').rglob('*'), key=lambda p: p.stat().st_size)[-1:]
  largest.write_bytes(largest.read_bytes()[:-1])
  assert command('verify', run) == 1
  said = capsys.readouterr().out
  assert 'differs: the checkpoint' in said and 'is damaged' in said
