"""A metric from one file outside of the package: while training, after, and on pages."""

import json

from tests import tiny


def test_a_metric(outside, trained_with, command, parts, tmp_path):
  values = tiny.diffusion_config(
    parts, {'evaluation': {'metrics': ['clip_score', 'spread']}},
    loop={'evaluate_every_steps': 2, 'keep_best': 'spread'},
  )
  workdir = trained_with(outside('metric'), values)
  scores = json.loads((workdir / 'scores.json').read_text())
  assert scores['generated']['spread'] > 0 and scores['real']['spread'] > 0
  out = tmp_path / 'scores.json'
  assert command(
    'evaluate', 'model', '--workdir', workdir, '--samples', 16, '--metrics', 'spread', '--out', out
  ) == 0
  found = json.loads(out.read_text())
  assert found['generated']['spread'] > 0 and 'spread' in json.dumps(found['intervals'])
  assert command('report', '--workdir', workdir) == 0
  assert 'Spread of features ↑' in (workdir / 'report.html').read_text()
  assert 'spread' in out.with_suffix('.html').read_text()
