"""Two runs side by side: scores, what makes them incomparable, curves, settings that differ."""

import html
import json
import re

import numpy as np
import pytest

from diffusion_jax.__main__ import main
from diffusion_jax.errors import UserError
from diffusion_jax.viz.compare import comparison_page
from diffusion_jax.viz.grids import make_grid, save_png


def _run(workdir, rate, samples, fd, steps):
  workdir.mkdir(parents=True)
  write = lambda name, value: (workdir / f'{name}.json').write_text(json.dumps(value))
  write('config', {'task': 'diffusion', 'optimizer': {'learning_rate': rate, 'name': 'adamw'},
                   **({'remat': 'none'} if rate > 0.1 else {})})
  write('scores', {'generated': {'fd_clip': fd, 'clip_score': 30.0}, 'real': {'fd_clip': 1.0},
                   'settings': {'samples': samples, 'features': 'clip/a/bicubic'}})
  lines = [{'kind': 'train', 'step': s, 'time': 1.0, 'loss': 1 / s, 'threads': s} for s in steps]
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for step in steps:
    image = make_grid(np.full((1, 8, 8, 3), step, np.uint8), 1)
    save_png(image, workdir / 'samples' / f'step_{step}.png', {})
  return workdir


@pytest.fixture
def runs(tmp_path):
  return (_run(tmp_path / 'a' / 'run', 0.1, 64, 12.5, (10, 20)),
          _run(tmp_path / 'b' / '<run>', 0.2, 128, 10.0, (20, 40)))


def test_runs_are_side_by_side_with_what_differs(runs, capsys):
  assert main(['report', '--workdir', str(runs[0]), '--compare', str(runs[1])]) == 0
  assert 'comparison.html' in capsys.readouterr().out
  page = (runs[0] / 'comparison.html').read_text()
  text = ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', page)).split())
  assert 'run beside <run>' in text and '<run>' not in page
  assert 'Fréchet distance, CLIP features ↓ 12.5 10 -2.5' in text
  assert 'CLIP score ↑ 30 30 0' in text
  assert 'features ↓: there was another number of samples (64, now 128); do not compare' in text
  assert text.count('do not compare') == 1  # A CLIP score is of any number of samples.
  assert '2 differ, 2 are the same.' in text
  assert 'optimizer.learning_rate 0.1 0.2 remat – none' in text
  frames = re.findall(r'<div class="frames">(.*?)</div>', page, re.DOTALL)
  assert [re.findall(r'data-step="(\d+)"', one) for one in frames] == [['10', '20'], ['20', '40']]
  (chart,) = re.findall(r'data-plot="([^"]*)"', page)  # The loss; threads are no part of a model.
  lines = json.loads(html.unescape(chart))['lines']
  assert [(line['name'], [x for x, _ in line['points']]) for line in lines] == [
    ('run', [10, 20]), ('<run>', [20, 40])
  ]


def test_runs_of_one_name_are_told_apart_and_damage_does_not_matter(tmp_path):
  first = _run(tmp_path / 'a' / 'run', 0.1, 64, 12.5, (10, 20))
  second = _run(tmp_path / 'b' / 'run', 0.1, 64, 12.5, (10,))
  for name, value in (('scores', {'generated': {'fd_clip': 'x'}, 'settings': 7}), ('config', {})):
    (second / f'{name}.json').write_text(json.dumps(value))
  with (second / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "tr')
  page = comparison_page([first, second])
  assert 'run (1) beside run (2)' in page and '–' in page
  with pytest.raises(UserError, match='gone'):
    comparison_page([first, tmp_path / 'gone'])
