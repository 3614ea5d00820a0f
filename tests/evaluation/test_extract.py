"""Features of image sets: piece by piece, killed and gone on, with damaged pictures among them.

Features and sums of images in batches over devices, and how long drawing may take.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.comparison import features_of, of_images
from diffusion_jax.evaluation.extract import Extraction, extract, gather, reader, regrouped
from diffusion_jax.evaluation.extractors.clip import CLIPExtractor
from diffusion_jax.evaluation.generated import Budget
from diffusion_jax.evaluation.images import Folder, RandomSubset, Split
from diffusion_jax.evaluation.metrics.metric import (
  Compared,
  metric_of,
  score,
  sums_suffice,
  value_names,
)
from diffusion_jax.evaluation.pieces import Chunks
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.models.network import Network
from diffusion_jax.models.text.clip import CLIP
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.registry import METRICS
from tests import tiny
from tests.evaluation.colours import Colours

RNG = np.random.default_rng(0)


@pytest.fixture
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def folder(tmp_path):
  """Eleven pictures of one size in two folders, whose mean colours are their numbers."""
  for i in range(11):
    path = tmp_path / 'pictures' / ('a' if i < 6 else 'b') / f'{i:02d}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 8, 3), i, np.uint8)).save(path)
  return tmp_path / 'pictures'


def _chunks(directory, total, **plan):
  return Chunks(directory, {'what': 'test', **plan}, total=total, size=4)


def test_each_image_is_there_once_and_in_its_place(folder, mesh, tmp_path):
  images = Folder(folder)
  chunks = _chunks(tmp_path / 'parts', len(images))
  kept = []
  extract(
    chunks, reader(images), Extraction([Colours()], mesh, 2),
    keep=lambda items, made: kept.append((items, len(made.images))),
  )
  found = gather(chunks)
  wanted = np.repeat(np.arange(11), 3).reshape(-1, 3)
  np.testing.assert_array_equal(found.columns['colours:mean'], wanted)
  assert found.rows.tolist() == list(range(11)) and found.errors == []
  assert kept == [(range(0, 4), 4), (range(4, 8), 4), (range(8, 11), 3)]
  assert chunks.missing() == []


def test_what_is_whole_is_kept_and_what_is_damaged_made_again(folder, mesh, tmp_path):
  images, calls = Folder(folder), []
  chunks = _chunks(tmp_path / 'parts', len(images))
  extraction = Extraction([Colours()], mesh, 4)

  def make(items):
    calls.append(items)
    return reader(images)(items)

  extract(chunks, make, extraction)
  wanted = gather(chunks).columns['colours:mean']
  file = tmp_path / 'parts' / '000001.npz'
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  (tmp_path / 'parts' / '000002.npz').write_bytes(b'')
  half = tmp_path / 'parts' / '.000002.npz.0123abcd.tmp'  # Of a process that was killed.
  half.write_bytes(data[:100])
  calls.clear()
  again = _chunks(tmp_path / 'parts', len(images))
  extract(again, make, extraction)
  assert calls == [range(4, 8), range(8, 11)]
  np.testing.assert_array_equal(gather(again).columns['colours:mean'], wanted)
  assert not half.exists()


def test_results_of_another_plan_are_not_mixed_in(tmp_path):
  _chunks(tmp_path, 10, seed=1)
  _chunks(tmp_path, 10, seed=1)
  with pytest.raises(UserError, match=r"another evaluation \(seed was 1, now 2\); choose another"):
    _chunks(tmp_path, 10, seed=2)
  with pytest.raises(UserError, match='total was 10, now 12'):
    _chunks(tmp_path, 12, seed=1)
  (tmp_path / 'plan.json').write_text('{')
  with pytest.raises(UserError, match=r'plan\.json is not readable JSON .* to begin anew'):
    _chunks(tmp_path, 10, seed=1)


def test_any_flipped_bit_is_found_out(tmp_path):
  """Also one in the archive's own tables, which may ask for a password or another kind of file."""
  chunks = _chunks(tmp_path, 4)
  chunks.save(0, {'x': np.arange(4.0), 'trouble': np.array([''] * 4)})
  file = tmp_path / '000000.npz'
  data, wanted = file.read_bytes(), chunks.load(0)['x']
  table = 8 * data.index(b'PK\x01\x02')
  for place in (*range(0, table, 61), *range(table, table + 8 * 46)):
    damaged = bytearray(data)
    damaged[place // 8] ^= 1 << place % 8
    file.write_bytes(damaged)
    if not chunks.missing():  # Times and the like are nobody's concern.
      np.testing.assert_array_equal(chunks.load(0)['x'], wanted)


def test_images_and_weights_that_changed_under_their_names_are_noticed(folder, mesh, tmp_path):
  colours = Colours()
  colours.params = {'w': np.arange(3, dtype=np.float32)}

  def evaluate():
    return features_of(of_images(Folder(folder)), Extraction([colours], mesh), tmp_path / 'parts')

  wanted = evaluate()[0].columns['colours:mean'][7]
  np.testing.assert_array_equal(evaluate()[0].columns['colours:mean'][7], wanted)
  colours.params['w'][1] += 1
  with pytest.raises(UserError, match=r'weights was .* choose another --out'):
    evaluate()
  colours.params['w'][1] -= 1
  Image.fromarray(np.full((12, 8, 3), 99, np.uint8)).save(folder / 'b' / '07.png')
  with pytest.raises(UserError, match=r"files was '11 files, .* now '11 files"):
    evaluate()


def test_pieces_are_dealt_out_to_processes(tmp_path, monkeypatch):
  chunks = _chunks(tmp_path, 22)
  dealt = []
  for count in (1, 2, 4):
    monkeypatch.setattr(jax, 'process_count', lambda count=count: count)
    for index in range(count):
      monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
      dealt.append(chunks.missing())
  assert dealt == [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 3, 5], [0, 4], [1, 5], [2], [3]]
  assert [len(chunks.items(i)) for i in range(6)] == [4, 4, 4, 4, 4, 2]
  with pytest.raises(ValueError, match='x has 3 rows; piece 5 has 2'):
    chunks.save(5, {'x': np.zeros(3)})


def test_damaged_pictures_are_counted_named_and_refused(folder, mesh, tmp_path):
  (folder / 'a' / '02.png').write_bytes(b'')
  file = folder / 'b' / '07.png'
  file.write_bytes(file.read_bytes()[:40])
  images = Folder(folder)
  chunks = _chunks(tmp_path / 'parts', len(images))
  extract(chunks, reader(images), Extraction([Colours()], mesh, 4))
  found = gather(chunks, most_unreadable=0.2)
  assert found.rows.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10]
  np.testing.assert_array_equal(found.columns['colours:mean'][:, 0], found.rows)
  assert len(found.errors) == 2 and '02.png' in found.errors[0] and '07.png' in found.errors[1]
  with pytest.raises(UserError, match=r'2 of 11 images cannot be read, more than .* 0.1 .*02\.png'):
    gather(chunks, most_unreadable=0.1)


def test_sizes_that_differ_are_resized_on_the_host_as_on_the_device(mesh):
  config = tiny.CLIP
  clip = Network.of(CLIP, config)
  params = {
    n: (n.endswith('scale') + 0.2 * RNG.normal(size=s.shape)).astype(np.float32)
    for n, s in clip.shapes.items()
  }
  sizes = [(40, 24), (17, 50), (32, 32), (9, 9), (64, 33), (40, 24)]
  images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
  extraction = Extraction([CLIPExtractor(clip, params, 'tiny')], mesh, 4)
  together = extraction(images)['clip/tiny/bicubic:embedding']
  alone = [Extraction([CLIPExtractor(clip, params, 'tiny')], mesh, 1)([image]) for image in images]
  for row, single in zip(together, alone, strict=True):
    np.testing.assert_allclose(row, single['clip/tiny/bicubic:embedding'][0], atol=1e-4)
  assert np.abs(together[0] - together[1]).max() > 1e-2


def test_sets_of_images(folder, sources):
  images = Folder(folder)
  assert [path.name for path in images.files] == [f'{i:02d}.png' for i in range(11)]
  first = RandomSubset(images, 5)
  numbers = [int(first[i].pixels[0, 0, 0]) for i in range(5)]
  assert len(set(numbers)) == 5 and len(first) == 5 and first.name.startswith('5 of folder:/')
  assert numbers != sorted(numbers)
  with pytest.raises(UserError, match='12 images cannot be taken of folder'):
    RandomSubset(images, 12)
  with pytest.raises(UserError, match='there is no folder'):
    Folder(folder / 'c')
  split = Split(sources[1], 'openmoji test')
  assert split[3].caption == sources[1][3]['captions'][0]
  np.testing.assert_array_equal(split[3].pixels, sources[1][3]['image'])


SLOW = """
import sys, time
import jax, numpy as np
from diffusion_jax.evaluation.pieces import Chunks
from diffusion_jax.evaluation.extract import Extraction, Made, extract
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.colours import Colours

def make(items):
  time.sleep(0.05)
  print(items.start, flush=True)
  return Made([np.full((8, 8, 3), i, np.uint8) for i in items], [''] * len(items))

chunks = Chunks(sys.argv[1], {'what': 'kill'}, total=102, size=4)
extract(chunks, make, Extraction([Colours()], make_mesh(MeshConfig(), jax.devices()[:1]), 4))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path, mesh):
  made, wanted = [], np.repeat(np.arange(102), 3).reshape(-1, 3)
  for lines in (3, 9, None):
    process = subprocess.Popen(
      [sys.executable, '-c', SLOW, str(tmp_path)], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True,
      env={**os.environ, 'PYTHONPATH': str(tiny.ROOT)},
    )
    for line in process.stdout:
      made.append(int(line))
      if lines is not None and len(made) >= lines:
        time.sleep(0.01 * lines)
        process.send_signal(signal.SIGKILL)
        break
    process.communicate(timeout=120)
    assert process.returncode == (0 if lines is None else -signal.SIGKILL)
  chunks = Chunks(tmp_path, {'what': 'kill'}, total=102, size=4)
  assert chunks.missing() == []
  np.testing.assert_array_equal(gather(chunks).columns['colours:mean'], wanted)
  # What was under way is made again, and no more: one piece read ahead, one being written.
  assert 23 <= len(made) <= 26 + 2 * 3
  assert json.loads((tmp_path / 'plan.json').read_text())['total'] == 102


_RANDOM = np.random.default_rng(0)
IMAGES = _RANDOM.integers(0, 256, (45, 4, 4, 3), np.uint8)
COLOURS = IMAGES.reshape(45, 16, 3).mean(1, dtype=np.float32)


class TwoOutputs:
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
  extraction = Extraction([TwoOutputs()], _mesh(devices), 16, ['fd', 'kl', 'clip_score'])
  assert [*extraction.columns] == ['colours/x/clean:pool3', 'colours/x/clean:embedding']
  for _ in range(2):  # A second set begins with nothing.
    found = extraction.collect(IMAGES[i : i + 20] for i in range(0, 45, 20))
    assert [*found.sums] == ['colours/x/clean:pool3'] and len(found.rows) == 45
    sums, wanted = found.sums['colours/x/clean:pool3'], Statistics.from_features(COLOURS)
    assert sums.n == 45
    np.testing.assert_allclose(sums.mean, wanted.mean, rtol=1e-6)
    np.testing.assert_allclose(sums.covariance, wanted.covariance, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.columns['colours/x/clean:embedding'], COLOURS / 2, rtol=1e-6)


def test_features_that_a_metric_asks_for_are_kept():
  extraction = Extraction([TwoOutputs()], _mesh(8), 3, ['fd', 'kid'])
  assert extraction.batch_size == 8
  found = extraction.collect([IMAGES])
  np.testing.assert_allclose(found.columns['colours/x/clean:pool3'], COLOURS, rtol=1e-6)
  assert sums_suffice(['fd', 'kl'], 'x:pool3') and not sums_suffice(['fd', 'kid'], 'x:pool3')
  assert sums_suffice(['fd', 'clip_score'], 'x:pool3')
  assert not sums_suffice(['fd', 'clip_score'], 'x:embedding')


def test_sums_that_are_not_finite_are_noticed():
  with pytest.raises(UserError, match='NaN or infinite'):
    Extraction([TwoOutputs(np.nan)], _mesh(1), metrics=['fd']).collect([IMAGES])


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
    value_names(['fd'], columns)
  assert len(value_names(['fd', 'kid'], columns[:1])) == 3


def test_figures_are_called_as_they_are_computed():
  n, d = 64, 5
  samples, reference = _RANDOM.normal(size=(n, d)), _RANDOM.normal(size=(n, d))
  moments = Statistics.from_features(reference)
  columns = ['inception/w/clean:pool3', 'inception/w/clean:spatial',
             'inception/w/clean:logits_unbiased', 'clip/x/bicubic:embedding',
             'dinov2/x/bicubic:cls', 'classifier/x/bicubic:penultimate',
             'classifier/x/bicubic:logits']
  labels = np.arange(n) % d
  compared = [Compared(c, samples, moments, reference, samples, labels) for c in columns]
  metrics = [name for name in METRICS if not metric_of(name).source]
  assert len(metrics) >= 10
  for name in metrics:
    found = score([name], compared, intervals=False)
    assert list(found.values) == value_names([name], columns), name
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
  for took in times:
    clock.now += took
    drawn += 1
    if budget.over():
      break
  assert drawn == batches
