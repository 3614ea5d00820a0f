"""Buckets: which size a picture goes to, and batches of one size that leave nothing out."""

import collections
import itertools
import json

import grain
import numpy as np
import pytest

from diffusion_jax.data.buckets import Bucketed, BySize, assign, in_buckets
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.order import BucketOrder, Shuffled, in_order, shuffled
from diffusion_jax.data.sources.arrays import ArraySource
from diffusion_jax.data.sources.folder import Alternating
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.data.unreadable import Counted, Damage
from diffusion_jax.errors import Unreadable, UserError
from tests import tiny

SHAPES = ((8, 16), (12, 12), (16, 8))
EXAMPLES, BATCH = 61, 4


class Sized:
  """Records of pictures with sizes of their own; some cannot be read at any size."""

  def __init__(self, originals, bad=()):
    self.originals, self.bad = np.asarray(originals, np.int32), set(bad)
    self.shapes = np.broadcast_to(np.int32([12, 12]), self.originals.shape)

  def __len__(self):
    return len(self.originals)

  def original_sizes(self):
    return self.originals

  def at_sizes(self, shapes):
    other = Sized(self.originals, self.bad)
    other.shapes = shapes
    return other

  def __getitem__(self, index):
    index = range(len(self))[index]
    if index in self.bad:
      raise Unreadable(f'record {index} is cut.')
    return {'n': index, 'image': np.full((*self.shapes[index], 3), index, np.uint8)}


class Noise:
  """A random transform whose draw shows in the batch."""

  random = True

  def __call__(self, record, rng):
    return record | {'noise': rng.random()}


def originals(count=EXAMPLES, seed=0):
  """Three pictures of ten are wide, one is tall, some a hundred times; the rest near a square."""
  rng = np.random.default_rng(seed)
  which = rng.choice(3, count, p=(0.3, 0.6, 0.1))
  return np.array([(50, 90), (70, 71), (90, 40)])[which]


def loader(source=None, **changes):
  source = in_buckets(Sized(originals()), SHAPES) if source is None else source
  return Loader(source, [Noise()], **{'batch_size': BATCH, 'seed': 3, **changes})


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted, strict=True):
    for name in ('n', 'noise', 'image'):
      np.testing.assert_array_equal(a[name], b[name])


def test_each_picture_goes_to_the_nearest_ratio():
  """By hand: the borders of 8:16, 12:12 and 16:8 are at ratios of the root of 2."""
  sizes = [(100, 100), (100, 141), (100, 142), (141, 100), (142, 100), (1, 900), (0, 0)]
  assert assign(np.array(sizes), SHAPES).tolist() == [1, 1, 0, 1, 2, 0, 1]
  # Of one ratio the largest that the picture covers, or the smallest.
  several = ((8, 8), (32, 32), (16, 16), (8, 16))
  sizes = [(7, 7), (15, 40), (16, 17), (31, 31), (500, 500)]
  assert assign(np.array(sizes), several).tolist() == [0, 3, 2, 2, 1]


def test_the_shuffle_is_that_of_grain_in_both_directions():
  for count, seed in ((1, 5), (2, 0), (31, 3), (4096, 2**32 - 1), (65_540, 7)):
    stream, order = grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat(), None
    order = Shuffled(count, seed)
    places = np.unique(np.r_[:min(count, 40), count - 1])
    for epoch in (0, 1, 1000):
      records = [stream[epoch * count + int(place)] for place in places]
      assert order.records(places, epoch).tolist() == records
      assert order(np.array(records), epoch).tolist() == places.tolist()


def test_no_record_is_left_out_where_grain_would_take_another_one_twice():
  count = 2**16 + 1
  stream = shuffled(grain.MapDataset.source(range(count)).seed(3), 3)
  epoch = Shuffled(count, 3).records(np.arange(count), 2)
  assert len(set(epoch.tolist())) == count
  assert [stream[2 * count + place] for place in (0, 77, count - 1)] == epoch[[0, 77, -1]].tolist()


def _by_hand(buckets, batch_size, epochs, records):
  """The batches of some epochs, by filling a list for each bucket."""
  found, open_ones = [], collections.defaultdict(list)
  for place, record in enumerate(itertools.chain.from_iterable(map(records, range(epochs)))):
    row = open_ones[buckets[record]]
    row.append(place)
    if len(row) == batch_size:
      found.append((buckets[record], list(row)))
      row.clear()
  return found


@pytest.mark.parametrize('batch_size', [1, 4, 17])
def test_the_order_is_that_of_filling_the_buckets_one_by_one(batch_size):
  """At random positions, too, and where a batch takes one bucket's records of many epochs."""
  buckets = assign(originals(), SHAPES).tolist()
  buckets[5] = 7  # The only one of its kind: a batch in so many epochs.
  every = np.arange(EXAMPLES)
  for places, records in (
    (in_order, lambda epoch: every),
    (Shuffled(EXAMPLES, 9), lambda epoch: Shuffled(EXAMPLES, 9).records(every, epoch)),
  ):
    wanted = _by_hand(buckets, batch_size, 40, records)
    order = BucketOrder(np.array(buckets), batch_size, places)
    numbers = np.random.default_rng(1).permutation(len(wanted)).tolist()
    for number in [*range(30), *numbers[:60], len(wanted) - 1]:
      bucket, found = order[number]
      assert (bucket, found.tolist()) == wanted[number]
      counts = collections.Counter(bucket for bucket, _ in wanted[:number])
      assert order.before(number) == {bucket: counts[bucket] for bucket in (0, 1, 2, 7)}


def test_every_batch_has_one_size_and_every_picture_comes_once_an_epoch():
  """Counted over 40 epochs: never twice as often, never left out, remainders carried over."""
  batches = take(loader(), EXAMPLES * 40 // BATCH)
  counts, seen = collections.Counter(), set()
  for batch in batches:
    (shape,) = {image.shape for image in batch['image']}
    seen.add(shape[:2])
    counts.update(batch['n'].tolist())
  assert seen == set(SHAPES) and set(counts) == set(range(EXAMPLES))
  # A bucket's last, open batch holds back less than one batch of its records.
  assert sum(counts.values()) == len(batches) * BATCH
  of = assign(originals(), SHAPES)
  for bucket in range(3):
    own = [counts[i] for i in np.flatnonzero(of == bucket)]
    assert max(own) - min(own) <= 1 and 40 * len(own) - 2 * BATCH < sum(own) <= 40 * len(own) + 2
  noise = [x for batch in batches for x in batch['noise'].tolist()]
  assert len(set(noise)) == len(noise)


@pytest.mark.parametrize('shapes', [SHAPES, ((12, 12), (20, 12))])
def test_one_bucket_in_use_is_the_order_and_the_values_of_one_size(shapes):
  pictures = Sized(np.full((EXAMPLES, 2), 70), bad={3, 40})
  wanted = take(loader(pictures), 40)
  assert_same(take(loader(in_buckets(pictures, shapes)), 40), wanted)


def test_nothing_depends_on_processes_threads_and_starts():
  """4 processes with 2 threads, then 1 with 5, then 2 without, cut off within a bucket's batch."""
  source = in_buckets(Sized(originals(), bad={1, 2, 30}), SHAPES)
  expected = take(loader(source, batch_size=12), 33)
  found, state = [], None
  for processes, threads, count in ((4, 2, 9), (1, 5, 4), (2, 0, 20)):
    loaders = [
      loader(source, batch_size=12, rows=rows, num_threads=threads)
      for rows in np.split(np.arange(12), processes)
    ]
    for one in loaders:
      if state is not None:
        one.set_state(state)
    for _ in range(count):
      parts = [next(one) for one in loaders]
      found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    state, *others = [json.loads(json.dumps(one.get_state())) for one in loaders]
    assert all(other == state for other in others)
  assert_same(found, expected)


def test_another_list_of_sizes_is_refused_on_resume():
  state = loader().get_state()
  changed = in_buckets(Sized(originals()), (*SHAPES, (10, 14)))
  for other in (loader(changed), loader(Sized(originals()))):
    with pytest.raises(UserError, match=r'state has buckets=8x16 .*use the same buckets'):
      other.set_state(state)
  with pytest.raises(UserError, match='buckets=nothing but this run has buckets=8x16'):
    loader().set_state(loader(Sized(originals())).get_state())


def test_what_replaces_a_bad_picture_is_of_its_bucket_or_cut_to_its_size():
  sizes = originals()
  tall = np.flatnonzero(assign(sizes, SHAPES) == 2)
  wide = np.flatnonzero(assign(sizes, SHAPES) == 0)
  damage = Damage()
  records = Counted(Sized(sizes, bad={*tall, wide[0]}), 0.5, damage, 'records')
  source = in_buckets(records, SHAPES)
  batches = take(loader(source), 5 * EXAMPLES // BATCH)
  for batch in batches:
    numbers = set(batch['n'].tolist())
    assert not numbers & {*tall.tolist(), int(wide[0])}
    if batch['image'].shape[1:3] == SHAPES[0]:
      assert numbers <= set(wide.tolist())
  assert {batch['image'].shape[1:3] for batch in batches} == set(SHAPES)
  assert len(damage) == len(tall) + 1  # Counted once, at whatever size.


def test_a_subject_and_its_class_are_in_buckets_both():
  """Each replaces its own kind alone; pictures that are repeated are of one size."""
  subject = Sized([(50, 90), (70, 70), (70, 70)], bad={1})
  both = Alternating(subject, Sized([(70, 70)] * 5), 0.5)
  source = in_buckets(both, SHAPES)
  assert source.buckets.tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 1, 1]
  batches = take(Loader(source, batch_size=2, seed=0), 40)
  kinds = collections.Counter(zip(
    [w for batch in batches for w in batch['weight'].tolist()],
    [batch['image'].shape[1:3] for batch in batches for _ in range(2)], strict=True,
  ))
  assert set(kinds) == {(2.0, SHAPES[0]), (2.0, SHAPES[1]), (1.0, SHAPES[1])}
  assert abs(kinds[1.0, SHAPES[1]] - 40) <= 2 and abs(kinds[2.0, SHAPES[0]] - 16) <= 1


def test_each_size_has_its_own_transforms():
  made = {s: build_transforms([('random_crop', {'padding': 2}), 'normalize'], size=s)
          for s in SHAPES}
  source = in_buckets(Sized(originals()), SHAPES)
  batches = Loader(source, [BySize(made)], batch_size=BATCH, seed=0)
  assert {batch['image'].shape[1:3] for batch in take(batches, 30)} == set(SHAPES)
  assert next(batches)['image'].dtype == np.float32


def test_the_spec_and_the_buckets_to_come():
  batches = loader()
  assert batches.spec()['image'].shape == next(loader())['image'].shape
  coming = batches.buckets_until(100)
  assert sorted(coming) == [0, 1, 2] and batches.buckets_until(1) == coming[:1]
  for bucket in coming:
    assert batches.spec(bucket)['image'].shape == (BATCH, *SHAPES[bucket], 3)
  assert_same(take(batches, 9), take(loader(), 9))


def test_pictures_of_a_folder_are_read_at_their_bucket_with_their_own_sizes(tmp_path):
  """SDXL is told of each its own size, and where its middle begins once it covers the bucket."""
  from PIL import Image

  for i, (height, width) in enumerate([(40, 20), (30, 30), (20, 50)] * 8):
    Image.new('RGB', (width, height), (i, 0, 0)).save(tmp_path / f'{i:02d}.png')
  train, _ = tiny.folder_sources(tmp_path, SHAPES, caption='a', test_fraction=0.0)
  source = in_buckets(train, SHAPES)
  told = {tuple(source[i]['image'].shape[:2]): source[i]['sizes'].tolist() for i in range(3)}
  assert told == {
    (16, 8): [40, 20, 0, 0, 16, 8], (12, 12): [30, 30, 0, 0, 12, 12], (8, 16): [20, 50, 0, 2, 8, 16]
  }
  assert train[0]['image'].shape == (12, 12, 3)  # Tests, previews and scores are of one size.
  assert isinstance(source, Bucketed) and source.labels is None


def test_pictures_of_one_size_have_no_buckets():
  with pytest.raises(UserError, match=r'data\.size has 3 sizes, but the pictures'):
    in_buckets(ArraySource({'n': np.arange(3)}), SHAPES)
  with pytest.raises(UserError, match='openmoji has one size'):
    from diffusion_jax.config import DataConfig
    from diffusion_jax.data.sources import open_data

    open_data(DataConfig('openmoji', SHAPES))


def test_a_million_records_take_no_time():
  """Half a second on one core; a loop over records takes four."""
  import time

  count = 10**6
  buckets = np.random.default_rng(0).integers(0, 40, count).astype(np.int16)
  start = time.process_time()
  order = BucketOrder(buckets, 256, Shuffled(count, 1))
  for number in (0, 3000, 3905):
    order[number]
  assert time.process_time() - start < 3
