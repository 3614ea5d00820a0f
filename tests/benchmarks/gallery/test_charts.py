"""Drawings of diffusion by the elements of their SVG."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.gallery.charts import error_chart, lattice, score_chart, trajectory_chart
from benchmarks.gallery.frame import PALETTE
from diffusion_jax.errors import UserError

INK = 'currentColor'
POINTS = lattice(2.0, 21)
BUMP = np.exp(-((POINTS - np.array([1.0, -0.5])) ** 2).sum(axis=-1))


def texts(svg):
  found = ElementTree.fromstring(svg).iter()
  return [''.join(e.itertext()).strip() for e in found if e.tag[-4:] == 'text']


def lines(svg, colour):
  """(vertices, style) of each path stroked in one colour."""
  paths = re.findall(rf'<path d="([^"]*)"[^>]*style="([^"]*stroke: {colour}[^"]*)', svg, re.I)
  vertices = lambda d: np.array(re.findall(r'[ML] (\S+) (\S+)', d), float)
  return [(vertices(d), style) for d, style in paths]


def shade(svg):
  data = re.search(r'data:image/png;base64,([^"]*)', svg)[1]
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGBA'))


def test_errors_are_straight_lines_of_their_order():
  calls = [5, 10, 20, 40]
  errors = {'euler': [(n, n**-1.0) for n in calls], 'heun': [(n, 3 * n**-2.0) for n in calls]}
  svg = error_chart(errors, title='errors', orders=(1, 2))
  assert {'euler', 'heun', 'network calls', 'order 1', 'order 2'} <= set(texts(svg))
  slopes = []
  for number in range(2):
    line = next(line for line, _ in lines(svg, PALETTE[number]) if len(line) == 4)
    steps = np.diff(line, axis=0)
    np.testing.assert_allclose(steps, steps[:1].repeat(3, axis=0), atol=1e-3)
    slopes.append(steps[0, 1] / steps[0, 0])
  assert slopes[1] == pytest.approx(2 * slopes[0], rel=1e-3)
  guides = [line for line, style in lines(svg, INK) if 'opacity: 0.4;' in style]
  found = [np.diff(g, axis=0)[0, 1] / np.diff(g, axis=0)[0, 0] for g in guides if len(g) == 2]
  assert any(f == pytest.approx(slopes[0], rel=1e-3) for f in found)
  assert any(f == pytest.approx(slopes[1], rel=1e-3) for f in found)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  'errors',
  [{}, {'a': []}, {'a': [(1, 0.0)]}, {'a': [(4, np.nan), (8, np.inf), (9, -1.0)]}, {'a': [(1, 1)]},
   {'a': [(1, 1.0), (2, 1.0)]}, {f'_{i}$x_{{$': [(1, 2.0), (2, 1.0 + i)] for i in range(26)}],
)
def test_odd_errors_still_give_a_chart(errors):
  svg = error_chart(errors, title='odd', orders=(1, 2, 3))
  drawn = sum(0 < e < np.inf for points in errors.values() for _, e in points)
  assert ('no values to draw' in texts(svg)) == (not drawn)
  left_out = sum(map(len, errors.values())) - drawn
  assert any(f'{left_out} value' in text for text in texts(svg)) == (left_out > 0)
  assert {name for name in errors} <= set(texts(svg))


def test_many_samplers_differ_in_colour_or_dashes():
  errors = {f's{i}': [(1, 2.0), (2, 1.0), (3, 0.5), (4, 0.4)] for i in range(12)}
  svg = error_chart(errors, title='many')
  solid = [len([s for v, s in lines(svg, PALETTE[0]) if len(v) == 4 and ('dasharray' in s) == dash])
           for dash in (False, True)]
  assert solid == [1, 1]


def test_paths_run_from_start_to_end_over_the_density():
  first, second = [[-2, -2], [0, 0], [1, -1]], [[2, 2], [1, 0], [1, 1]]
  paths = np.array([first, second], float).transpose(1, 0, 2)
  svg = trajectory_chart(paths, title='paths', density=(POINTS, BUMP))
  drawn = [line for line, style in lines(svg, INK) if len(line) == 3 and 'opacity: 0.45' in style]
  assert len(drawn) == 2
  # Axes of equal scales: from SVG back to the plane by one factor.
  factor = (drawn[0][1, 0] - drawn[0][0, 0]) / 2
  for line, wanted in zip(drawn, paths.transpose(1, 0, 2), strict=True):
    moves = np.diff(line, axis=0) / factor * [1, -1]
    np.testing.assert_allclose(moves, np.diff(wanted, axis=0), atol=1e-3)
  assert {'start', 'end'} <= set(texts(svg))
  opacity = shade(svg)[..., 3].astype(float)
  y, x = np.unravel_index(opacity.argmax(), opacity.shape)
  h, w = opacity.shape
  # The first row is the lowest y: the image is drawn upside down.
  assert re.search(r'transform="matrix\(\S+ 0 0 -', svg)
  assert (x + 0.5) / w * 4.2 - 2.1 == pytest.approx(1.0, abs=0.15)
  assert (y + 0.5) / h * 4.2 - 2.1 == pytest.approx(-0.5, abs=0.15)
  assert opacity.min() < 0.1 * opacity.max()


@pytest.mark.filterwarnings('error')
def test_odd_paths_still_give_a_picture():
  broken = np.zeros((4, 3, 2))
  broken[2, 1] = np.nan, np.inf
  broken[-1] = 1.0
  for paths in (broken, np.full((2, 1, 2), np.nan), np.zeros((1, 1, 2))):
    assert trajectory_chart(paths, title='odd').startswith('<svg')
  many = np.random.default_rng(0).normal(size=(30, 5000, 2))
  assert len(trajectory_chart(many, title='many')) < 400_000


def test_arrows_point_along_the_field_with_capped_lengths():
  points = lattice(1.0, 5)
  vectors = np.stack([np.ones((5, 5)), np.ones((5, 5))], axis=-1) * [2.0, 1.0]
  vectors[0, 0] *= 100.0
  vectors[1, 1] *= 0.5
  vectors[2, 2] = np.nan
  svg = score_chart(points, vectors, title='field', density=(POINTS, BUMP), samples=points[0])
  arrows = [
    np.array(re.findall(r'[ML] (\S+) (\S+)', d), float)
    for d in re.findall(r'<path d="(M [^"]*)"[^>]*style="fill: currentColor', svg)
  ]
  arrows = [arrow for arrow in arrows if len(arrow) == 8]
  assert len(arrows) == 24
  # Around each: one corner of the base, neck, barb, tip, barb, neck, the other corner.
  spans = np.array([(a[3] - (a[0] + a[6]) / 2) * [1, -1] for a in arrows])
  angles = np.degrees(np.arctan2(spans[:, 1], spans[:, 0]))
  np.testing.assert_allclose(angles, np.degrees(np.arctan2(1, 2)), atol=0.01)
  lengths = np.linalg.norm(spans, axis=1)
  np.testing.assert_allclose(lengths[0], lengths[-1], rtol=0.02)  # Cut to the others' length.
  assert lengths[6] < 0.7 * lengths[-1]


@pytest.mark.filterwarnings('error')
def test_odd_fields_still_give_a_picture():
  points = lattice(1.0, 3)
  for vectors in (np.zeros((3, 3, 2)), np.full((3, 3, 2), np.nan)):
    assert score_chart(points, vectors, title='odd').startswith('<svg')
  flat = score_chart(points, 0 * points, title='flat', density=(points, np.zeros((3, 3))))
  assert flat.startswith('<svg')


def test_wrong_shapes_are_refused():
  points = lattice(1.0, 3)
  for call in (
    lambda: trajectory_chart(np.zeros((4, 2)), title='x'),
    lambda: trajectory_chart(np.zeros((4, 0, 2)), title='x'),
    lambda: score_chart(points, np.zeros((2, 3, 2)), title='x'),
    lambda: score_chart(points, points, title='x', density=(points, np.zeros((2, 2)))),
    lambda: score_chart(points, points, title='x', samples=np.zeros((5, 3))),
  ):
    with pytest.raises(UserError, match='give'):
      call()


@pytest.mark.parametrize(
  'draw',
  [
    lambda title: error_chart({'a': [(1, 1.0), (2, 0.5)]}, title=title, orders=(1,)),
    lambda title: trajectory_chart(POINTS, title=title, density=(POINTS, BUMP)),
    lambda title: score_chart(POINTS, -POINTS, title=title, density=(POINTS, BUMP)),
  ],
)
def test_pictures_fit_any_page(draw):
  svg = draw('"a" & b')
  root = ElementTree.fromstring(svg)
  assert root.get('aria-label') == '"a" & b' and root.get('viewBox') and not root.get('width')
  assert INK in svg and '#010203' not in svg and '#ffffff' not in svg.lower()
  assert svg == draw('"a" & b')
  ids = set(re.findall(r'\bid="([^"]*)"', svg))
  assert ids and not ids & set(re.findall(r'\bid="([^"]*)"', draw('other')))
