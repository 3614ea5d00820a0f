"""Charts by the elements of their SVG."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from diffusion_jax.viz.charts import (
  PALETTE,
  line_chart,
  schedule_chart,
  smooth,
  spread,
  thin,
  timestep_chart,
)

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


def _texts(svg):
  found = ElementTree.fromstring(svg).iter()
  return [''.join(e.itertext()).strip() for e in found if e.tag[-4:] == 'text']


def _lines(svg, colour):
  """Vertices of each path drawn in one colour."""
  paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg, flags=re.IGNORECASE)
  return [[tuple(map(float, xy)) for xy in re.findall(r'[ML] (\S+) (\S+)', d)] for d in paths]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('series', _ODD)
@pytest.mark.parametrize('options', [{}, {'log_y': True, 'smoothing': 0.5}])
def test_odd_data_still_gives_a_chart(series, options):
  svg = line_chart(series, title='odd', **options)
  assert svg.startswith('<svg') and svg.endswith('</svg>')
  drawable = any(
    v is not None and abs(v) < 1e30 for points in series.values() for _, v in points
  )
  assert ('no values to draw' in _texts(svg)) == (not drawable)


def test_left_out_values_are_counted_and_interrupt_the_line():
  points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 3.0), (6, 4.0)]
  svg = line_chart({'loss': points}, title='loss')
  assert any('2 values missing or not finite' in text for text in _texts(svg))
  (path,) = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {PALETTE[0]}; stroke-width: 1.8', svg,
                       flags=re.IGNORECASE)
  assert path.count('M') == 2


def test_a_line_goes_through_its_points():
  svg = line_chart({'loss': [(0, 0.0), (100, 1.0), (200, 0.5)]}, title='loss')
  (a, b, c), *_ = _lines(svg, PALETTE[0])
  assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.01)
  assert (a[1] - b[1]) == pytest.approx(2 * (a[1] - c[1]), abs=0.01)  # SVG's y points down.


def test_smoothing_draws_raw_values_faint_and_the_average_strong():
  points = [(i, float(i % 2)) for i in range(100)]
  raw_only = _lines(line_chart({'loss': points}, title='x'), PALETTE[0])
  both = line_chart({'loss': points}, title='x', smoothing=0.9)
  faint, strong = _lines(both, PALETTE[0])
  assert len(raw_only) == 1
  height = lambda line: max(y for _, y in line) - min(y for _, y in line)
  assert height(strong) < 0.3 * height(faint)
  assert 'stroke-opacity: 0.4' in both
  # Too few points for the average to mean something.
  assert 'stroke-opacity: 0.4' not in line_chart({'a': points[:20]}, title='x', smoothing=0.9)


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
  ys = [y for _, y in _lines(svg, PALETTE[0])[0]]
  steps = [b - a for a, b in itertools.pairwise(ys)]
  assert steps == pytest.approx([steps[0]] * 4, abs=0.01)
  assert {'0.01', '1'} <= set(_texts(svg))
  assert not any('$' in text for text in _texts(svg))


def test_names_are_text_not_markup_or_mathematics():
  series = {'<script>$x_1$': [(1, 1.0)], '_b & c': [(1, 2.0)]}
  svg = line_chart(series, title='"<script>"')
  assert '<script' not in svg
  assert {'<script>$x_1$', '_b & c'} <= {text.strip() for text in _texts(svg)}
  assert ElementTree.fromstring(svg).get('aria-label') == '"<script>"'


def test_svg_is_deterministic_and_its_ids_are_its_own():
  draw = lambda value: line_chart({'loss': [(1, 1.0), (2, value)]}, title='loss')
  assert draw(2.0) == draw(2.0)
  ids = [set(re.findall(r'\bid="([^"]*)"', draw(value))) for value in (2.0, 3.0)]
  assert ids[0] and not ids[0] & ids[1]
  used = set(re.findall(r'(?:url\(|href=")#([^")]*)', draw(2.0)))
  assert used and used <= ids[0]


def test_svg_takes_the_colour_of_the_page_and_its_width():
  root = ElementTree.fromstring(line_chart({'a': [(1, 1.0)]}, title='a'))
  assert root.get('viewBox') and root.get('width') is None and root.get('height') is None
  svg = line_chart({'a': [(1, 1.0)]}, title='a')
  assert 'fill: currentColor' in svg and 'stroke: currentColor' in svg
  assert '#010203' not in svg and '#ffffff' not in svg.lower()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  'records', [[], [(1, [])], [(1, [None, math.nan])], [(1, [1.0])], [(1, [0.0, 1.0]), (2, [1e9])]]
)
def test_odd_timestep_records_still_give_a_chart(records):
  assert timestep_chart(records, title='t').startswith('<svg')


def test_timestep_chart_spreads_its_lines_over_the_run():
  records = [(step, [1.0, 2.0, None, 3.0]) for step in range(0, 101, 10)]
  names = [text for text in _texts(timestep_chart(records, title='t')) if 'step ' in text]
  assert names == ['step 0', 'step 20', 'step 50', 'step 80', 'step 100']


def test_spread():
  assert spread([1, 2, 3], 5) == [1, 2, 3]
  assert spread(list(range(100)), 3) == [0, 50, 99]
  assert spread([1, 2, 3], 1) == [3]


def _styled(svg, colour):
  """(vertices, style) of each path stroked in one colour."""
  paths = re.findall(rf'<path d="([^"]*)"[^>]*style="([^"]*stroke: {colour}[^"]*)', svg, re.I)
  vertices = lambda d: np.array(re.findall(r'[ML] (\S+) (\S+)', d), float)
  return [(vertices(d), style) for d, style in paths]


def test_a_schedule_is_two_lines_and_its_log_snr():
  svg = schedule_chart(T, 1 - T, T, title='flow')
  assert {'t', 'log-SNR'} <= set(_texts(svg))
  (alpha, solid), (sigma, dashed), (log_snr, _) = _styled(svg, PALETTE[0])
  assert 'dasharray' in dashed and 'dasharray' not in solid
  assert len(alpha) == len(sigma) == 41 and len(log_snr) == 39  # Both ends are infinite.
  # alpha falls and sigma is its mirror image; SVG's y points down.
  np.testing.assert_allclose(alpha[:, 1], sigma[::-1, 1], atol=1e-3)
  assert (np.diff(alpha[:, 1]) > 0).all() and (np.diff(log_snr[:, 1]) > 0).all()
  np.testing.assert_allclose(log_snr[0, 0], alpha[1, 0], atol=1e-3)


def test_large_sigmas_get_a_logarithmic_axis():
  svg = schedule_chart(T, np.ones(41), 0.01 * 5000**T, title='ve')
  (sigma,) = [line for line, style in _styled(svg, PALETTE[0]) if 'dasharray' in style]
  steps = np.diff(sigma[:, 1])
  np.testing.assert_allclose(steps, steps[0], atol=1e-3)
