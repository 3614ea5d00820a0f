"""Rows of one table whose figures must not be compared, and those that may be."""

import pytest

from diffusion_jax.evaluation.metrics.metric import value_of
from diffusion_jax.evaluation.report import add_rows, incomparable, read_rows, write
from diffusion_jax.viz.evaluation import write_evaluation_page


def _row(*figures, **settings):
  known = {'reference': 'openmoji train', 'reference_images': 3312, 'samples': 256,
           'features': ['clip/a/bicubic', 'inception/w/tensorflow'], 'steps': 4} | settings
  return {f'generated.{name}': 1.5 for name in figures} | {
    f'settings.{name}': value for name, value in known.items()
  }


ALL = ('fid', 'fd_clip', 'fd_clip_infinity', 'kid_clip', 'clip_score', 'precision', 'psnr')


@pytest.mark.parametrize(('settings', 'figures', 'says'), [
  ({'steps': 50}, (), ''),
  ({'samples': 64}, ('fd_clip', 'fid', 'precision'), 'number of samples (64, now 256)'),
  ({'reference': 'x'}, ('fd_clip', 'fd_clip_infinity', 'fid', 'kid_clip', 'precision', 'psnr'),
   'the reference was another (x, now openmoji train)'),
  ({'reference_images': 100}, ('fd_clip', 'fid', 'kid_clip', 'precision', 'psnr'),
   'another number of images (100, now 3312)'),
  ({'features': ['clip/a/bicubic', 'inception/w/clean']}, ('fid', 'precision'),
   'resized by another rule (inception/w/clean, now inception/w/tensorflow)'),
  ({'features': ['clip/b/bicubic', 'inception/w/tensorflow']},
   ('clip_score', 'fd_clip', 'fd_clip_infinity', 'kid_clip'), 'the features were others'),
  # Other features beside the same ones change nothing.
  ({'features': ['clip/a/bicubic', 'dinov2/c/clean', 'inception/w/tensorflow']}, (), ''),
])
def test_figures_are_told_that_differ_by_more_than_the_model(tmp_path, settings, figures, says):
  add_rows(tmp_path / 'table.csv', [_row(*ALL, **settings)])
  found = incomparable(read_rows(tmp_path / 'table.csv')[0], _row(*ALL))
  assert len(found) == bool(figures)
  if figures:
    assert found[0].startswith(f'{", ".join(figures)}: ') and says in found[0]


def test_the_last_row_with_the_figure_counts():
  same, other = _row('fid'), _row('fid', samples=64)
  assert incomparable([other, same], _row('fid')) == []
  assert len(incomparable([same, other], _row('fid'))) == 1
  # The last row has no such figure, and a model alone says nothing of a reference.
  assert len(incomparable([other, _row('kid_clip')], _row('fid'))) == 1
  assert incomparable([{'test.psnr': 3.0}], {'test.psnr': 4.0}) == []


def test_families():
  found = {name: value_of(name)[1] for name in (
    'fid', 'sfid', 'kid_std', 'inception_score', 'rfd_dinov2', 'kid_clip_std', 'cmmd',
    'class_accuracy', 'fd_classifier_infinity', 'psnr', 'latent_bits_per_dim_discrete',
  )}
  assert list(found.values()) == [
    'inception', 'inception', 'inception', 'inception', 'dinov2', 'clip', 'clip', 'classifier',
    'classifier', '', '',
  ]


def test_titles_say_which_way_is_better():
  titles = {name: value.titled(name, family) for name in (
    'fid', 'rfid', 'sfid', 'kid_std', 'fd_clip', 'rfd_dinov2_infinity', 'psnr', 'energy_distance',
    'retrieval_r1_of_3312', 'retrieval_r5_of_100',
  ) for value, family in [value_of(name)]}
  assert list(titles.values()) == [
    'FID ↓', 'rFID ↓', 'sFID ↓', 'KID, deviation over subsets',
    'Fréchet distance, CLIP features ↓',
    'Fréchet distance, DINOv2 features, for infinitely many ↓', 'PSNR, dB ↑',
    'Energy distance to the test points ↓', 'Own caption ranked first of 3,312 ↑',
    'Own caption among the first 5 of 100 ↑',
  ]
  assert value_of('loss') is None


def test_figures_are_in_the_json_only_once_they_are_in_the_table(tmp_path):
  """For what is in there is not computed again."""
  (tmp_path / 'scores.csv').mkdir()
  with pytest.raises(OSError):
    write(tmp_path / 'scores.json', {'generated': {'fid': 3.0}}, write_evaluation_page)
  assert not (tmp_path / 'scores.json').exists()


def test_an_evaluation_that_is_written_again_says_the_same(tmp_path):
  def evaluated(samples, said):
    scores = {'generated': {'fid': 3.0 + samples}, 'warnings': [], 'settings': {'samples': samples}}
    write(tmp_path / 'scores.json', scores, write_evaluation_page, said.append)
    return (tmp_path / 'scores.json').read_text()

  said = [[], [], [], []]
  texts = [evaluated(n, out) for n, out in zip((64, 256, 256, 64), said, strict=True)]
  assert said[0] == said[3] == [] and texts[0] == texts[3]
  assert len(said[1]) == 1 and said[1] == said[2] and texts[1] == texts[2]
  assert 'fid: there was another number of samples (64, now 256)' in texts[1]
  assert 'another number of samples' not in texts[0]
  html = (tmp_path / 'scores.html').read_text()
  assert 'another number of samples' not in html
  assert len(read_rows(tmp_path / 'scores.csv')[0]) == 2
