"""An evaluator from one file outside of the package: while training and by evaluate."""

import json

from tests import tiny


def test_an_evaluator(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(
    parts, {'evaluation': {'metrics': ['clip_score']}},
    loop={'evaluate_every_steps': 2, 'keep_best': 'brightness', 'keep_best_is': 'highest',
          'evaluators': (('brightness', {'count': 3}),)},
  )
  workdir = trained_with(outside('evaluator'), values)
  scores = json.loads((workdir / 'scores.json').read_text())
  assert 0 < scores['generated']['brightness'] < 255
  assert 'Brightness of 3 images.' in scores['measured']
  assert tiny.metrics(workdir, 'evaluation')
  out = tmp_path / 'scores.json'
  assert command(
    'evaluate', 'model', '--workdir', workdir, '--samples', 16, '--metrics', 'clip_score',
    '--out', out,
  ) == 0
  found = json.loads(out.read_text())
  assert found['generated']['brightness'] == scores['generated']['brightness']
  assert 'Brightness of 3 images.' in found['measured']
