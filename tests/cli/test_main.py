"""The commands beside train and sample."""

import json

import pytest

from diffusion_jax import __version__
from diffusion_jax.cli.main import COMMANDS

METRICS = {'fd_clip', 'kid_clip', 'kid_clip_std', 'clip_score', 'retrieval_r1'}


def test_evaluate_compares_with_real_and_untrained(command, finished, tmp_path, capsys):
  out = tmp_path / 'new' / 'scores.json'
  assert command('evaluate', 'model', '--workdir', finished, '--samples', 16, '--out', out) == 0
  scores = json.loads(out.read_text())
  assert scores.keys() == {
    'generated', 'real', 'untrained', 'settings', 'intervals', 'measured', 'warnings'
  }
  for column in ('generated', 'real', 'untrained'):
    assert scores[column].keys() == METRICS
  assert scores['settings']['samples'] == 16 and scores['settings']['sampler'] == 'ddim'
  assert scores['real']['fd_clip'] < scores['generated']['fd_clip']
  assert scores['generated']['fd_clip'] != scores['untrained']['fd_clip']
  wanted = json.loads((finished / 'scores.json').read_text())
  for column in ('generated', 'real', 'untrained'):
    assert scores[column] == pytest.approx(wanted[column], rel=0.02, abs=1e-4), column
  printed = capsys.readouterr().out
  assert all(word in printed for word in ('fd_clip', 'untrained', str(out)))


def test_evaluate_knows_the_other_tasks(command, trained, tmp_path):
  out = tmp_path / 'scores.json'
  subject = ('evaluate', 'model', '--workdir', trained('clip'))
  assert command(*subject, '--samples', 16, '--out', out) == 0
  wanted = json.loads((trained('clip') / 'scores.json').read_text())
  found = json.loads(out.read_text())
  assert found.keys() == wanted.keys() and 'retrieval_r1_of_16' in found['test']
  for column in ('test', 'untrained'):
    assert found[column] == pytest.approx(wanted[column], rel=1e-3, abs=1e-4)
  assert found['measured'] == wanted['measured'] and found['settings'] == {'step': 4}


@pytest.mark.parametrize(('arguments', 'named'), [
  (['likelihood', '--trace', 'exakt'], 'exact'),
  (['likelihood', '--samples', '99999'], '99999 samples cannot be scored'),
  (['likelihood', '--guidance', '2'], 'there is no option --guidance'),
  (['model', '--draws', '4'], '--draws does nothing without bits_per_dim'),
])
def test_options_of_the_likelihood_are_checked(fails, finished, tmp_path, arguments, named):
  out = tmp_path / 'bits.json'
  assert named in fails('evaluate', *arguments, '--workdir', finished, '--out', out)
  assert not out.exists()


def test_the_likelihood_of_an_autoencoder_is_refused(fails, trained, tmp_path):
  message = fails(
    'evaluate', 'likelihood', '--workdir', trained('autoencoder'), '--out', tmp_path / 'bits.json'
  )
  assert 'trains autoencoder; a likelihood needs a diffusion model' in message


def test_report_writes_the_page_anew(command, finished, copy_of):
  run = copy_of(finished)
  (run / 'report.html').unlink()
  assert command('report', '--workdir', run) == 0
  assert 'Fréchet distance, CLIP features' in (run / 'report.html').read_text()


def test_version_and_help(capsys):
  from diffusion_jax.__main__ import main

  with pytest.raises(SystemExit) as stop:
    main(['--version'])
  assert stop.value.code == 0 and capsys.readouterr().out.split() == ['diffusion_jax', __version__]
  for name, module in COMMANDS.items():
    with pytest.raises(SystemExit) as stop:
      main([name, '--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f'python -m diffusion_jax {name} ' in module.DESCRIPTION
    assert module.DESCRIPTION in out
