"""Figures by name: each is what its function gives, and says what to beware of."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import compare, features_of, of_images
from diffusion_jax.evaluation.extract import Extraction, Features
from diffusion_jax.evaluation.images import Folder
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.metrics.images import clip_score, retrieval_recall
from diffusion_jax.evaluation.metrics.kernel import kernel_distance
from diffusion_jax.evaluation.metrics.manifold import precision_recall
from diffusion_jax.evaluation.metrics.metric import Compared, outputs_of, score
from diffusion_jax.evaluation.statistics import FittedGaussian, Statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.colours import Colours

RNG = np.random.default_rng(3)
N, D = 200, 6
SAMPLES, REFERENCE = RNG.normal(size=(N, D)), RNG.normal(0.3, 1.2, (N + 50, D))
TEXTS = SAMPLES + 0.5 * RNG.normal(size=(N, D))
MOMENTS = Statistics.from_features(REFERENCE)


def _clip(**changes):
  given = {'moments': MOMENTS, 'reference': REFERENCE, 'texts': TEXTS} | changes
  return Compared('clip/tiny/bicubic:embedding', SAMPLES, **given)


def test_every_figure_is_that_of_its_function():
  found = score(
    ['fd', 'kid', 'precision_recall', 'density_coverage', 'cmmd', 'kl', 'clip_score', 'retrieval',
     'fd_infinity'], [_clip()], seed=5,
  )
  values = found.values
  wanted = frechet_distance(Statistics.from_features(SAMPLES), MOMENTS)
  assert values['fd_clip'] == pytest.approx(wanted, rel=1e-9)
  wanted = kernel_distance(SAMPLES, REFERENCE, subsets=100, subset_size=N, seed=5)
  assert (values['kid_clip'], values['kid_clip_std']) == wanted
  both = precision_recall(SAMPLES, REFERENCE)
  assert (values['precision_clip'], values['recall_clip']) == tuple(both)
  assert values['clip_score'] == clip_score(SAMPLES, TEXTS)
  assert values['retrieval_r1'] == retrieval_recall(SAMPLES, TEXTS, k=1, seed=5)
  assert {'density_clip', 'coverage_clip', 'cmmd', 'kl_clip', 'kl_reverse_clip',
          'fd_clip_infinity'} < set(values)
  for name in ('fd_clip', 'clip_score', 'retrieval_r1', 'fd_clip_infinity'):
    interval = found.intervals[name]
    assert interval.low < values[name] < interval.high and interval.estimate == values[name]
  assert any(text.startswith('fd_clip of 200 samples is not comparable') for text in found.warnings)
  both = 'precision_clip and recall_clip of 200 samples'
  assert any(text.startswith(both) for text in found.warnings)


def test_inception_s_figures_stand_alone_and_each_output_serves_its_own():
  columns = [
    Compared(f'inception/w/tensorflow:{output}', SAMPLES, MOMENTS, REFERENCE)
    for output in ('pool3', 'spatial', 'logits_unbiased')
  ]
  found = score(['fd', 'inception_score', 'kid'], columns)
  assert set(found.values) == {
    'fid', 'sfid', 'inception_score', 'inception_score_std', 'kid', 'kid_std'
  }
  known = {'pool3': 2048, 'spatial': 2023, 'logits': 1008, 'logits_unbiased': 1008}
  assert outputs_of(['fd', 'kid'], known) == ('pool3', 'spatial')
  assert outputs_of(['inception_score'], known) == ('logits_unbiased',)


def test_statistics_alone_serve_the_distance_of_gaussians_only():
  fitted = FittedGaussian(MOMENTS.mean, MOMENTS.covariance)
  only = _clip(moments=fitted, reference=None)
  assert score(['fd'], [only]).values['fd_clip'] == pytest.approx(
    score(['fd'], [_clip()]).values['fd_clip'], rel=1e-9
  )
  with pytest.raises(UserError, match='kid needs the reference images themselves'):
    score(['fd', 'kid'], [only])
  with pytest.raises(UserError, match='clip_score needs captions'):
    score(['clip_score'], [_clip(texts=None)])
  with pytest.raises(UserError, match='inception_score needs the features logits_unbiased'):
    score(['inception_score'], [_clip()])
  with pytest.raises(UserError, match=r"no metric 'FID'; did you mean fd\?"):
    score(['FID'], [_clip()])
  with pytest.raises(UserError, match='fd_clip would be computed twice'):
    score(['fd'], [_clip(), _clip()])


def test_rows_that_could_not_be_read_take_their_captions_with_them():
  column = 'clip/tiny/bicubic:embedding'
  rows = np.delete(np.arange(N), [0, 7])
  samples = Features({column: SAMPLES[rows]}, rows, ['a is damaged', 'b is damaged'])
  found = compare(samples, {}, ['clip_score'], texts={column: TEXTS})
  assert found.values['clip_score'] == clip_score(SAMPLES[rows], TEXTS[rows])
  assert '2 images could not be read' in found.warnings[-1]
  wide = {column: FittedGaussian(np.zeros(D + 1), np.eye(D + 1))}
  with pytest.raises(UserError, match=r'reference are 7 wide, but clip.* is 6'):
    compare(samples, wide, ['fd'])


def test_two_folders(tmp_path):
  """From pictures on disk to a distance that can be told beforehand: of their mean colours."""
  colours = {name: RNG.integers(0, 256, (40, 3)) for name in ('one', 'two')}
  for name, rows in colours.items():
    (tmp_path / name).mkdir()
    for i, row in enumerate(rows):
      pixels = np.broadcast_to(row.astype(np.uint8), (5, 4, 3))
      Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name / f'{i:02d}.png')
  mesh = make_mesh(MeshConfig(), jax.devices()[:2])
  found = {
    name: features_of(of_images(Folder(tmp_path / name)), Extraction([Colours()], mesh, 16),
                      tmp_path / f'{name}.parts', chunk=12)[0]
    for name in colours
  }
  for name, rows in colours.items():
    np.testing.assert_array_equal(found[name].columns['colours:mean'], rows)
  pooled = {n: dataclasses.replace(f, columns={'colours:cls': f.columns['colours:mean']})
            for n, f in found.items()}
  scores = compare(pooled['one'], pooled['two'], ['fd', 'precision_recall'])
  wanted = [Statistics.from_features(colours[name]) for name in ('one', 'two')]
  assert scores.values['fd_colours'] == pytest.approx(frechet_distance(*wanted), rel=1e-9)
