"""Charts of a sweep: which there are, and which points their lines join."""

import re

import pytest

from diffusion_jax.viz.sweep import CHARTS, _lines, label, sweep_charts


def _scores(**changes):
  points = {}
  for g in (1.0, 4.0):
    for n in (5, 10):
      points[f'g{g} n{n}'] = {'combination': {'guidance': g, 'steps': n}, 'network_calls': 2 * n}
  figures = {name: {'fd_clip': 9.0 - i, 'clip_score': 30.0 + i} for i, name in enumerate(points)}
  return {**figures, 'real': {'fd_clip': 1.0}, 'sweep': points, **changes}


def test_one_chart_for_each_thing_that_a_distance_is_shown_against():
  charts = sweep_charts(_scores())
  assert [heading for heading, _ in charts] == [
    'Fréchet distance, CLIP features ↓ against CLIP score',
    'Fréchet distance, CLIP features ↓ against network calls',
  ]
  # Two values of the other setting: two lines, named below.
  for (_, chart), other in zip(charts, ('steps', 'guidance'), strict=True):
    assert len(re.findall(rf'>{other}=\d+<', chart)) == 2
    assert 'aria-label="fd_clip against' in chart and '>fd_clip: squared distance' in chart
  assert sweep_charts({'generated': {'fd_clip': 1.0}}) == []
  assert len(sweep_charts(_scores(real={}))) == 2


def test_samplers_without_a_number_of_calls_are_left_out():
  scores = _scores()
  for point in scores['sweep'].values():
    point['network_calls'] = None
  assert len(sweep_charts(scores)) == 1


def test_lines_join_points_that_differ_in_one_setting():
  points = [
    {'clip_score': s, 'fd_clip': f, 'combination': {'guidance': g, 'sampler': n}}
    for s, f, g, n in ((3, 1, 4.0, 'a'), (2, 5, 1.0, 'a'), (7, 7, 1.0, 'b'))
  ]
  lines = _lines(points, CHARTS[0], 'fd_clip')
  assert {name: [tuple(p) for p in line] for name, line in lines.items()} == {
    'sampler=a': [(2, 5, '1'), (3, 1, '4')], 'sampler=b': [(7, 7, '1')],
  }


@pytest.mark.parametrize(('combination', 'text'), [
  ({}, ''), ({'guidance': 4.0, 'sampler': 'ddim'}, 'guidance=4 sampler=ddim'),
  # Two values never share a label, which names a column and a folder.
  ({'ema_halflife_images': 1e6}, 'ema_halflife_images=1e+06'),
  ({'ema_halflife_images': 1000001.0}, 'ema_halflife_images=1000001.0'),
])
def test_labels(combination, text):
  assert label(combination) == text
