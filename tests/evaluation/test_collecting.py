"""Features and sums of images in batches over devices, and how long drawing may take."""

import jax
import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.budget import Budget
from diffusion_jax.evaluation.collecting import Collector, regrouped
from diffusion_jax.evaluation.figures import figure_names, sums_suffice
from diffusion_jax.evaluation.scores import METRICS, Compared, score
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (45, 4, 4, 3), np.uint8)
COLOURS = IMAGES.reshape(45, 16, 3).mean(1, dtype=np.float32)


class Colours:
  """Two outputs whose values are known: the mean of each channel, and half of it."""

  name, size, resizing = 'colours/x/clean', 8, 'clean'

  def __init__(self, scale=0.5):
    self.params, self.widths = {'scale': np.float32(scale)}, {'pool3': 3, 'embedding': 3}

  def apply(self, params, images):
    mean = images.astype('float32').mean((1, 2))
    return {'pool3': mean, 'embedding': mean * params['scale']}


def _mesh(devices):
  return make_mesh(MeshConfig(), jax.devices()[:devices])


@pytest.mark.parametrize('devices', [1, 8])
def test_sums_on_devices_are_those_of_the_features(devices):
  """45 images in batches of 16 + 16 + 13, given as 20 + 20 + 5: the last one is padded."""
  collector = Collector([Colours()], _mesh(devices), ['fd', 'kl', 'clip_score'], batch_size=16)
  assert collector.columns == ['colours/x/clean:pool3', 'colours/x/clean:embedding']
  for _ in range(2):  # A second set begins with nothing.
    found = collector(IMAGES[i : i + 20] for i in range(0, 45, 20))
    sums, wanted = found['colours/x/clean:pool3'], Statistics.from_features(COLOURS)
    assert sums.n == 45
    np.testing.assert_allclose(sums.mean, wanted.mean, rtol=1e-6)
    np.testing.assert_allclose(sums.covariance, wanted.covariance, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found['colours/x/clean:embedding'], COLOURS / 2, rtol=1e-6)


def test_features_that_a_metric_asks_for_are_kept():
  collector = Collector([Colours()], _mesh(8), ['fd', 'kid'], batch_size=3)
  assert collector.batch_size == 8
  found = collector([IMAGES])
  np.testing.assert_allclose(found['colours/x/clean:pool3'], COLOURS, rtol=1e-6)
  assert sums_suffice(['fd', 'kl'], 'x:pool3') and not sums_suffice(['fd', 'kid'], 'x:pool3')
  assert sums_suffice(['fd', 'clip_score'], 'x:pool3')
  assert not sums_suffice(['fd', 'clip_score'], 'x:embedding')


def test_sums_that_are_not_finite_are_noticed():
  with pytest.raises(UserError, match='NaN or infinite'):
    Collector([Colours(np.nan)], _mesh(1), ['fd'])([IMAGES])


def test_images_are_regrouped_in_their_order():
  sizes = (1, 9, 4, 0, 20, 2)
  ends = np.cumsum(sizes)
  batches = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
  found = list(regrouped(batches, 8))
  assert [len(batch) for batch in found] == [8, 8, 8, 8, 4]
  assert np.concatenate(found).tolist() == list(range(36))
  assert list(regrouped([], 8)) == []


@pytest.mark.parametrize(('columns', 'named'), [
  (['clip/a/bicubic:embedding', 'clip/b/bicubic:embedding'], 'fd_clip would be computed twice'),
  (['inception/w/clean:pool3', 'inception/w/tensorflow:pool3'],
   'fid would be computed twice, of inception/w/clean and of inception/w/tensorflow'),
])
def test_two_figures_of_one_name_are_refused_before_any_work(columns, named):
  with pytest.raises(UserError, match=named):
    figure_names(['fd'], columns)
  assert len(figure_names(['fd', 'kid'], columns[:1])) == 3


def test_figures_are_called_as_they_are_computed():
  n, d = 64, 5
  samples, reference = RNG.normal(size=(n, d)), RNG.normal(size=(n, d))
  moments = Statistics.from_features(reference)
  columns = ['inception/w/clean:pool3', 'inception/w/clean:spatial',
             'inception/w/clean:logits_unbiased', 'clip/x/bicubic:embedding',
             'dinov2/x/bicubic:cls', 'classifier/x/bicubic:penultimate',
             'classifier/x/bicubic:logits']
  labels = np.arange(n) % d
  compared = [Compared(c, samples, moments, reference, samples, labels) for c in columns]
  metrics = [name for name, metric in METRICS.items() if not metric.source]
  assert len(metrics) >= 10
  for name in metrics:
    found = score([name], compared, intervals=False)
    assert list(found.values) == figure_names([name], columns), name
  sums = [Compared(c, None, moments, sums=Statistics.from_features(samples)) for c in columns]
  kept = [c for c in compared if c.column == columns[3]]
  of_sums = score(['fd', 'kl'], [sums[3]]).values
  assert of_sums == pytest.approx(score(['fd', 'kl'], kept, intervals=False).values, rel=1e-9)


class Clock:
  """Time as told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.mark.parametrize(('seconds', 'times', 'batches'), [
  (10.0, [7, 2, 2, 2, 2, 2, 2], 5),  # The first one compiled: it counts as 2.
  (10.0, [2] * 7, 5),
  (10.5, [2] * 7, 5),  # One more would end at 12.
  (10.0, [1, 3, 3, 3, 3], 4),
  (1.0, [2] * 7, 2),  # Two at least: the first says nothing.
  (0.0, [2] * 7, 7),
])
def test_drawing_ends_before_the_batch_that_would_take_too_long(seconds, times, batches):
  clock = Clock()
  budget, drawn = Budget(seconds, clock), 0
  for time in times:
    clock.now += time
    drawn += 1
    if budget.over():
      break
  assert drawn == batches
