"""Charts of schedules by the elements of their SVG."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from diffusion_jax.viz.diffusion import schedule_chart
from diffusion_jax.viz.svg import PALETTE

INK = 'currentColor'
T = np.linspace(0, 1, 41)
SCHEDULES = {
  'cosine': (T, np.cos(np.pi / 2 * T), np.sin(np.pi / 2 * T)),
  'flow': (T, 1 - T, T),
}


def texts(svg):
  found = ElementTree.fromstring(svg).iter()
  return [''.join(e.itertext()).strip() for e in found if e.tag[-4:] == 'text']


def lines(svg, colour):
  """(vertices, style) of each path stroked in one colour."""
  paths = re.findall(rf'<path d="([^"]*)"[^>]*style="([^"]*stroke: {colour}[^"]*)', svg, re.I)
  vertices = lambda d: np.array(re.findall(r'[ML] (\S+) (\S+)', d), float)
  return [(vertices(d), style) for d, style in paths]


def test_a_schedule_is_two_lines_and_its_log_snr():
  svg = schedule_chart(SCHEDULES, title='schedules')
  assert {'cosine', 'flow', 't', 'log-SNR'} <= set(texts(svg))
  for number in range(2):
    # The legend repeats the solid line with a few vertices.
    drawn = [line for line in lines(svg, PALETTE[number]) if len(line[0]) > 5]
    (alpha, solid), (sigma, dashed), (log_snr, _) = drawn
    assert 'dasharray' in dashed and 'dasharray' not in solid
    assert len(alpha) == len(sigma) == 41 and len(log_snr) == 39  # Both ends are infinite.
    # alpha falls and sigma is its mirror image; SVG's y points down.
    np.testing.assert_allclose(alpha[:, 1], sigma[::-1, 1], atol=1e-3)
    assert (np.diff(alpha[:, 1]) > 0).all() and (np.diff(log_snr[:, 1]) > 0).all()
    np.testing.assert_allclose(log_snr[0, 0], alpha[1, 0], atol=1e-3)


def test_large_sigmas_get_a_logarithmic_axis():
  svg = schedule_chart({'ve': (T, np.ones(41), 0.01 * 5000**T)}, title='ve')
  (sigma,) = [line for line, style in lines(svg, PALETTE[0]) if 'dasharray' in style]
  steps = np.diff(sigma[:, 1])
  np.testing.assert_allclose(steps, steps[0], atol=1e-3)


def test_pictures_fit_any_page():
  svg = schedule_chart(SCHEDULES, title='"a" & b')
  root = ElementTree.fromstring(svg)
  assert root.get('aria-label') == '"a" & b' and root.get('viewBox') and not root.get('width')
  assert INK in svg and '#010203' not in svg and '#ffffff' not in svg.lower()
  assert svg == schedule_chart(SCHEDULES, title='"a" & b')
  ids, others = (
    set(re.findall(r'\bid="([^"]*)"', chart))
    for chart in (svg, schedule_chart(SCHEDULES, title='other'))
  )
  assert ids and not ids & others
