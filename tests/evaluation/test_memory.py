"""The memory of an evaluation does not grow with the number of images."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffusion_jax.evaluation.comparison import Work, features_of
from diffusion_jax.evaluation.extract import Extraction, Made
from diffusion_jax.evaluation.metrics.gaussians import frechet_distance
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests import tiny

WIDTH, PIECE = 256, 1024


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


def features_of_two(folder, count):
  """Two sets of so many images."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  taken = Extraction([Projected()], mesh, PIECE)
  return [
    features_of(
      Work(count, {'seed': seed}, _images(seed)), taken, folder / f'{count}-{seed}',
      most_unreadable=0.1, chunk=PIECE,
    )[0] for seed in (1, 2)
  ]


SCRIPT = """
import json, sys
from pathlib import Path
from benchmarks.peak_memory import PeakMemory, anonymous_bytes
from diffusion_jax.evaluation import extract as extraction
from diffusion_jax.evaluation.comparison import compare
from tests.evaluation.test_memory import PIECE, features_of_two

extraction.MOST_THUMBNAILS = 0
folder, peaks = Path(sys.argv[1]), []
# Programs and buffers that are made once.
compare(*features_of_two(folder, 2 * PIECE), ['fd', 'kl'])
for count in (4 * PIECE, 16 * PIECE):
  before = anonymous_bytes()
  with PeakMemory() as peak:
    scores = compare(*features_of_two(folder, count), ['fd', 'kl'])
  peaks.append(before + peak.bytes)
print(json.dumps([peaks, scores.values['fid'], list(scores.intervals)]))
"""


@pytest.mark.slow
def test_four_times_the_images_take_no_more_memory(tmp_path):
  """In a process of its own, whose allocator holds nothing of other tests."""
  # In one pool and in small pages: a pool for each thread, of which some grow by 2 MB for one
  # number, has varied the peak by 15 MB.
  allocator = {'GLIBC_TUNABLES': '', 'MALLOC_ARENA_MAX': '1'}
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, str(tmp_path)], cwd=tiny.ROOT, text=True, capture_output=True,
    env={**os.environ, 'PYTHONPATH': str(tiny.ROOT), **allocator}, timeout=200, check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  peaks, fid, intervals = json.loads(done.stdout.splitlines()[-1])
  sets = features_of_two(tmp_path, 16 * PIECE)  # The pieces are there.
  features = [one.columns['inception/projected/clean:pool3'] for one in sets]
  assert all(one.shape == (16 * PIECE - 1, WIDTH) for one in features)
  wanted = frechet_distance(*(Statistics.from_features(one) for one in features))
  assert fid == pytest.approx(wanted, rel=1e-6) and intervals == ['fid']
  # The features of the larger sets alone are 13 MB more than those of the smaller, twice.
  assert peaks[1] < peaks[0] + 12e6, peaks
