"""A source of data from one file outside of the package is trained on, by name."""

import json

from tests import tiny


def test_a_source(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(
    parts, data={'dataset': 'plain:40'}, loop={'evaluate_samples': 0}
  )
  workdir = trained_with(outside('source'), values)
  assert json.loads((workdir / 'status.json').read_text())['state'] == 'finished'
  out = tmp_path / 'images'
  assert command('sample', '--workdir', workdir, '--prompt', 'red', '--out', out) == 0
  assert (out / '0000_red.png').exists()
  scores = tmp_path / 'scores.json'
  arguments = ('--workdir', workdir, '--samples', 16, '--metrics', 'clip_score', '--out', scores)
  assert command('evaluate', 'model', *arguments) == 0
  assert json.loads(scores.read_text())['generated']


def test_an_unknown_source_is_one_sentence(parts, fails, tmp_path):
  values = tiny.diffusion_config(parts, data={'dataset': 'plain:40'})
  recipe = tiny.write_config(tmp_path / 'recipe.py', values)
  message = fails('train', '--config', recipe, '--workdir', tmp_path / 'run')
  assert "data.dataset is 'plain'" in message
