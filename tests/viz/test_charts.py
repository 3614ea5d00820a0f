"""Charts by their elements: paths of the SVG, words beside it, values that a pointer finds."""

import html
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from diffusion_jax.viz.charts import (
  cloud_chart,
  histogram_chart,
  line_chart,
  schedule_charts,
  smooth,
  spread,
  thin,
  timestep_chart,
)
from diffusion_jax.viz.plot import Scale, tick_text

T = np.linspace(0, 1, 41)
_ODD = [
  {},
  {'loss': []},
  {'loss': [(1, 2.0)]},
  {'loss': [(1, math.nan)]},
  {'loss': [(1, math.inf), (2, None), (3, -math.inf)]},
  {'loss': [(1, 1e308), (2, -1e308)]},
  {'loss': [(1, 0.0), (2, 0.0)]},
  {'loss': [(1, 3.0), (1, 3.0)]},
  {'$x_{$': [(1, 1.0), (2, math.nan), (3, 2.0)], '_hidden': [(1, -1.0)]},
]


class _Parser(HTMLParser):
  """texts: of elements. tags: (tag, attributes), all closed in order."""

  def __init__(self, text):
    super().__init__()
    self.texts, self.tags, self._open = [], [], []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data.strip())


def _texts(chart):
  return _Parser(chart).texts


def _lines(chart, look):
  """Vertices of each path of these classes."""
  paths = [a for tag, a in _Parser(chart).tags if tag == 'path' and a['class'] == look]
  return [[tuple(map(float, xy)) for xy in re.findall(r'[ML](\S+?) ([\d.-]+)', path['d'])]
          for path in paths]


def _said(chart):
  """The values that a pointer finds, by line."""
  data = json.loads(html.unescape(re.search(r'data-plot="([^"]*)"', chart)[1]))
  return {line['name']: line['points'] for line in data['lines']}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('series', _ODD)
@pytest.mark.parametrize('options', [{}, {'log_y': True, 'smoothing': 0.5}])
def test_odd_data_still_gives_a_chart(series, options):
  svg = line_chart(series, title='odd', **options)
  assert _Parser(svg).tags and 'nan' not in svg.replace('no values', '')
  drawable = any(
    v is not None and abs(v) < 1e30 for points in series.values() for _, v in points
  )
  assert any('no values to draw' in text for text in _texts(svg)) == (not drawable)


def test_left_out_values_are_counted_and_interrupt_the_line():
  points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 3.0), (6, 4.0)]
  svg = line_chart({'loss': points}, title='loss')
  assert any('2 values missing or not finite' in text for text in _texts(svg))
  path = re.search(r'<path class="s0" d="([^"]*)"', svg)[1]
  assert path.count('M') == 2
  assert _said(svg) == {'loss': [[1, 1], [2, 2], [5, 3], [6, 4]]}


def test_a_line_goes_through_its_points():
  svg = line_chart({'loss': [(0, 0.0), (100, 1.0), (200, 0.5)]}, title='loss')
  ((a, b, c),) = _lines(svg, 's0')
  assert (a[0], b[0], c[0]) == (0, 500, 1000)
  assert (a[1] - b[1]) == pytest.approx(2 * (a[1] - c[1]), abs=0.01)  # SVG's y points down.


def test_smoothing_draws_raw_values_faint_and_the_average_strong():
  points = [(i, float(i % 2)) for i in range(100)]
  assert not _lines(line_chart({'loss': points}, title='x'), 's0 faint')
  both = line_chart({'loss': points}, title='x', smoothing=0.9)
  (faint,), (strong,) = _lines(both, 's0 faint'), _lines(both, 's0')
  height = lambda line: max(y for _, y in line) - min(y for _, y in line)
  assert height(strong) < 0.3 * height(faint)
  assert _said(both)['loss'] == [[i, i % 2] for i in range(100)]  # What was logged, not averaged.
  # Too few points for the average to mean something.
  assert 'faint' not in line_chart({'a': points[:20]}, title='x', smoothing=0.9)


def test_smooth_by_hand():
  points = [(1, 0.0), (2, math.nan), (3, 3.0), (4, 6.0)]
  expected = [(0 + 1.5 + 1.5) / 1.75, (0 + 3 + 3) / 2, (0 + 1.5 + 6) / 1.75]
  assert [s for s, _ in smooth(points, 0.5)] == [1, 3, 4]
  assert [v for _, v in smooth(points, 0.5)] == pytest.approx(expected)
  assert [v for _, v in smooth([(i, 7.0) for i in range(50)], 0.9)] == pytest.approx([7.0] * 50)


def test_thin_keeps_spikes_and_gaps():
  points = [(i, 0.0) for i in range(100_000)]
  points[54_321] = (54_321, 9.0)
  points[77_777] = (77_777, math.nan)
  kept = thin(points, 600)
  assert len(kept) <= 600
  assert (54_321, 9.0) in kept
  assert any(math.isnan(v) for _, v in kept)
  assert kept == sorted(kept, key=lambda p: p[0])
  assert len(line_chart({'loss': points}, title='long')) < 60_000


def test_log_axis_has_plain_labels_and_straightens_powers_of_ten():
  points = [(i, 10.0**-i) for i in range(5)]
  svg = line_chart({'loss': points}, title='x', log_y=True)
  ys = [y for _, y in _lines(svg, 's0')[0]]
  steps = [b - a for a, b in itertools.pairwise(ys)]
  assert steps == pytest.approx([steps[0]] * 4, abs=0.11)
  assert {'0.01', '1'} <= set(_texts(svg))
  assert not any('$' in text for text in _texts(svg))


def test_names_are_text_not_markup_and_the_title_is_for_screen_readers():
  series = {'<script>$x_1$': [(1, 1.0)], '_b & c': [(1, 2.0)]}
  chart = line_chart(series, title='"<script>"', ylabel='<b>')
  assert '<script' not in chart and '<b>' not in chart
  assert {'<script>$x_1$', '_b & c', '<b>', 'step'} <= set(_texts(chart))
  (frame,) = [a for _, a in _Parser(chart).tags if a.get('role') == 'img']
  assert frame['aria-label'].startswith('"<script>": <b> over step. <script>$x_1$: 1 points, 1 at')


def test_every_chart_says_what_its_axes_count_and_is_the_same_again():
  ones = np.ones(5)
  draw = lambda: [
    line_chart({'a': [(1, 2.0), (2, 3.0)]}, title='a'),
    timestep_chart([(1, [1.0, 2.0])], title='t'),
    histogram_chart({'a': ones}, title='h', xlabel='pixels'),
    cloud_chart({'a': np.eye(2), 'b': np.eye(2)}, title='c', xlabel='axis 1', ylabel='axis 2'),
    *(chart for _, chart in schedule_charts(T, 1 - T, T)),
  ]
  assert draw() == draw()
  for chart in draw():
    units = re.findall(r'<p class="(?:across )?unit">([^<]+)</p>', chart)
    assert len(units) == 2 and re.search(r'role="img" aria-label="[^"]{5,}"', chart)
    assert 'style="width' not in chart and 'preserveAspectRatio="none"' in chart


def test_a_histogram_is_fractions_of_each_name():
  values = {'a': np.array([1.0, 1.0, 2.0, np.nan]), 'b': np.array([2.0])}
  chart = histogram_chart(values, title='h', xlabel='pixels')
  said = _said(chart)
  assert [sum(y for _, y in said[name]) for name in 'ab'] == pytest.approx([1, 1])
  assert said['a'][0][1] == pytest.approx(2 / 3) and said['b'][-1][1] == 1
  assert '1 value missing or not finite' in ' '.join(_texts(chart))


@pytest.mark.parametrize(('low', 'high', 'log', 'texts'), [
  (0, 800, False, ['0', '200', '400', '600', '800']), (0.9, 1.3, False, None),
  (0.95, 1.94, False, ['1', '1.2', '1.4', '1.6', '1.8']),
  (1e-6, 1, True, ['10⁻⁶', '10⁻⁴', '0.01', '1']),
  (8, 70, True, ['10', '20', '50']), (3.0, 3.0, False, ['3']), (-2, 2, False, None),
  (0, 25_000, False, ['0', '5000', '10k', '15k', '20k', '25k']),
])
def test_ticks_are_round_and_within(low, high, log, texts):
  ticks = Scale(low, high, log).ticks()
  assert all(-1e-9 <= at <= 1 + 1e-9 for at, _ in ticks) and len(ticks) <= 7
  assert texts is None or [text for _, text in ticks] == texts


def test_numbers_of_axes_are_short():
  numbers = (0, 0.25, -1.5, 12_000, 2.5e6, 3e9, 1e-4, 2e-5, 1e13)
  assert [tick_text(v) for v in numbers] == [
    '0', '0.25', '-1.5', '12k', '2.5M', '3G', '10⁻⁴', '2·10⁻⁵', '10¹³',
  ]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  'records', [[], [(1, [])], [(1, [None, math.nan])], [(1, [1.0])], [(1, [0.0, 1.0]), (2, [1e9])]]
)
def test_odd_timestep_records_still_give_a_chart(records):
  assert _Parser(timestep_chart(records, title='t')).tags


def test_timestep_chart_spreads_its_lines_over_the_run():
  records = [(step, [1.0, 2.0, None, 3.0]) for step in range(0, 101, 10)]
  names = [text for text in _texts(timestep_chart(records, title='t')) if 'step ' in text]
  assert names == ['step 0', 'step 20', 'step 50', 'step 80', 'step 100']


def test_spread():
  assert spread([1, 2, 3], 5) == [1, 2, 3]
  assert spread(list(range(100)), 3) == [0, 50, 99]
  assert spread([1, 2, 3], 1) == [3]


def test_a_schedule_is_two_lines_and_its_log_snr():
  (_, both), (_, ratio) = schedule_charts(T, 1 - T, T)
  (alpha,), (sigma,) = _lines(both, 's0'), _lines(both, 's1 dashed')
  (log_snr,) = _lines(ratio, 's0')
  assert len(alpha) == len(sigma) == 41 and len(log_snr) == 39  # Both ends are infinite.
  # alpha falls and sigma is its mirror image; SVG's y points down.
  alpha, sigma, log_snr = map(np.array, (alpha, sigma, log_snr))
  np.testing.assert_allclose(alpha[:, 1], sigma[::-1, 1], atol=0.11)
  assert (np.diff(alpha[:, 1]) > 0).all() and (np.diff(log_snr[:, 1]) > 0).all()
  np.testing.assert_allclose(log_snr[0, 0], alpha[1, 0], atol=0.11)


def test_large_sigmas_get_a_logarithmic_axis():
  (_, both), _ = schedule_charts(T, np.ones(41), 0.01 * 5000**T)
  (sigma,) = map(np.array, _lines(both, 's1 dashed'))
  np.testing.assert_allclose(np.diff(sigma[:, 1]), np.diff(sigma[:, 1])[0], atol=0.21)
