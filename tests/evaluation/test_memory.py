"""The memory of an evaluation does not grow with the number of images."""

import jax
import numpy as np
import pytest

from benchmarks.peak_memory import PeakMemory
from diffusion_jax.evaluation import extraction
from diffusion_jax.evaluation.extraction import Extraction, Made
from diffusion_jax.evaluation.metrics.frechet import frechet_distance
from diffusion_jax.evaluation.offline import Work, compare, features_of
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh

WIDTH, PIECE = 256, 2048


class Projected:
  """Pixels times a fixed matrix: as wide as one likes."""

  name, size, resizing = 'inception/projected/clean', 4, 'clean'

  def __init__(self):
    rng = np.random.default_rng(0)
    self.widths = {'pool3': WIDTH}
    self.params = {'matrix': rng.normal(size=(48, WIDTH)).astype(np.float32)}

  def apply(self, params, images):
    flat = images.reshape(len(images), -1).astype('float32') / 255
    return {'pool3': jax.numpy.tanh(flat @ params['matrix'])}


def _images(seed):
  def make(items):
    rng = np.random.default_rng((seed, items.start))
    images = list(rng.integers(0, 256, (len(items), 4, 4, 3), np.uint8))
    gone = items.start == 0  # One that cannot be read must not bring all into memory.
    return Made([None, *images[1:]] if gone else images, ['damaged'] * gone + [''] * (
      len(items) - gone
    ))

  return make


def _evaluate(folder, count):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  taken = Extraction([Projected()], mesh, PIECE)
  sets = [
    features_of(
      Work(count, {'seed': seed}, _images(seed)), taken, folder / f'{count}-{seed}',
      most_unreadable=0.1, chunk=PIECE,
    )[0] for seed in (1, 2)
  ]
  return sets, compare(*sets, ['fd', 'kl'])


@pytest.mark.slow
def test_four_times_the_images_take_no_more_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(extraction, 'MOST_THUMBNAILS', 0)
  _evaluate(tmp_path, 2 * PIECE)  # Programs and buffers that are made once.
  peaks = []
  for count in (4 * PIECE, 16 * PIECE):
    with PeakMemory() as peak:
      sets, scores = _evaluate(tmp_path, count)
    peaks.append(peak.bytes)
  features = [one.columns['inception/projected/clean:pool3'] for one in sets]
  assert all(one.shape == (16 * PIECE - 1, WIDTH) for one in features)
  wanted = frechet_distance(*(Statistics.from_features(one) for one in features))
  assert scores.values['fid'] == pytest.approx(wanted, rel=1e-6) and 'fid' in scores.intervals
  # The larger sets are 50 MB more, twice.
  assert peaks[1] < peaks[0] + 12e6, peaks
