"""Caches of what frozen networks make of records: in memory, on the disk, mended and refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from diffusion_jax.data.cache import (
  Choose,
  disk,
)
from diffusion_jax.data.cache.rows import pack, unpack
from diffusion_jax.data.transforms import (
  ChooseCaption,
  RandomCrop,
  RandomFlip,
)
from diffusion_jax.errors import UserError
from tests import tiny
from tests.data.cached import (
  COUNT,
  EDGE,
  Factor,
  Letters,
  assert_same,
  fill,
  model_of,
  records_in,
  source_of,
  values,
  write_picture,
)

pytestmark = pytest.mark.usefixtures('small_files')


def test_memory_and_disk_hold_the_same_rows(folder, tmp_path, encoded):
  source, cache = source_of(folder), tmp_path / 'cache'
  memory = fill(source, None)
  assert encoded() == {'latents': COUNT, 'texts': COUNT}
  disk_ = fill(source, cache)
  assert encoded() == {'latents': COUNT, 'texts': COUNT}
  assert_same(memory, disk_)
  row = disk_[3]
  np.testing.assert_allclose(
    row['latents'][0]['z'], source[3]['image'] / np.float32(127.5) - 1, atol=1e-6
  )
  np.testing.assert_array_equal(row['latents'][0]['sizes'], source[3]['sizes'])
  wanted = Letters().encode({}, {'tokens': Letters().tokens(source[3]['captions'])})
  found = [part['text'] for part in row['texts']]
  np.testing.assert_allclose(found, wanted['text'], atol=1e-3)  # Kept in float16.
  np.testing.assert_array_equal([part['mask'] for part in row['texts'][1:]], wanted['mask'][1:])
  again = fill(source, cache)
  assert encoded() == {'latents': 0, 'texts': 0}
  assert_same(pickle.loads(pickle.dumps(again)), memory)
  null = disk.open_shard(next((cache / 'null').glob('*.array_record')))
  assert not null.arrays(0, 0)['text'].any() and len(null) == 1
  small = fill(source, tmp_path / 'small', dtype='bfloat16', text_dtype='float32')
  z, exact = small[3]['latents'][0]['z'], row['latents'][0]['z']
  assert z.dtype == np.float32 and 0 < np.abs(z - exact).max() < 2**-8
  np.testing.assert_allclose(small[3]['texts'][1]['text'], wanted['text'][1], atol=1e-6)


def test_only_what_has_changed_is_encoded_again(folder, tmp_path, encoded):
  cache = tmp_path / 'cache'
  fill(source_of(folder), cache)
  encoded()
  write_picture(folder, 0)  # Before all others, so that all of those move.
  (folder / '005.txt').write_text('another text')
  shutil.copy(folder / '001.png', folder / '002.png')  # Its content is known.
  for name in ('007.png', '007.txt'):
    (folder / name).unlink()
  mended = fill(source_of(folder), cache)
  assert encoded() == {'latents': 1, 'texts': 2}
  assert_same(mended, fill(source_of(folder), None))
  fill(source_of(folder), tmp_path / 'fresh')
  assert records_in(cache) == records_in(tmp_path / 'fresh')


@pytest.mark.parametrize(('changes', 'named'), [
  ({'dtype': 'bfloat16'}, r'latents differs in dtype \(float32, now bfloat16\)'),
  ({'text_dtype': 'float32'}, r'texts differs in dtype \(float16'),
  ({'factor': 2.0}, 'latents differs in weights of factor'),
  ({'model': model_of(Factor(2))}, 'latents differs in space'),
  ({'name': 'folder:y'}, r'differs in source \(folder:x, now folder:y\)'),
  ({'views': 2, 'transforms': (RandomFlip(),), 'specs': ('random_flip',)},
   r'differs in data.transforms .*views \(1, now 2\), seed \(none, now 0\)'),
])
def test_a_cache_of_something_else_is_refused_by_name(folder, tmp_path, changes, named, encoded):
  cache = tmp_path / 'cache'
  fill(source_of(folder), cache)
  before = tiny.snapshot(cache)
  with pytest.raises(UserError, match=named) as error:
    fill(source_of(folder), cache, **changes)
  assert 'settings.cache_dir' in str(error.value) and str(cache) in str(error.value)
  assert {k: v for k, v in tiny.snapshot(cache).items() if k in before} == before


def damaged(cache, how):
  """Damage one file of latents, the date of which stays where that is said; its number of rows."""
  file = sorted((cache / 'latents').glob('*.array_record'))[1]
  stat, data = file.stat(), bytearray(file.read_bytes())
  rows = len(disk.open_shard(file))
  if how == 'gone':
    file.unlink()
  elif how == 'cut':
    file.write_bytes(data[: len(data) // 2])
  else:
    data[data.find(b'"float32"') + 200] ^= 4
    file.write_bytes(data)
  if how == 'flipped unseen':
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  return file, rows


@pytest.mark.parametrize('how', ['gone', 'cut', 'flipped', 'flipped unseen'])
def test_damage_is_found_and_encoded_again(folder, tmp_path, how, encoded, capsys):
  cache = tmp_path / 'cache'
  fill(source_of(folder), cache)
  whole = records_in(cache)
  encoded()
  file, rows = damaged(cache, how)
  if how == 'flipped unseen':  # Only reading it tells.
    found = fill(source_of(folder), cache)
    assert encoded()['latents'] == 0
    with pytest.raises(UserError, match=f'{file.name} is damaged .*start again'):
      values(found)
  mended = fill(source_of(folder), cache)
  assert encoded() == {'latents': rows, 'texts': 0}
  assert (f'{file} is damaged' in capsys.readouterr().err) == (how != 'gone')
  assert records_in(cache) == whole
  assert_same(mended, fill(source_of(folder), None))


@pytest.mark.parametrize('content', [b'', b'[]', b'{"made_of": 5}', b'{"format": 99}', b'\x00'])
def test_a_damaged_manifest_is_named(folder, tmp_path, content):
  cache = tmp_path / 'cache'
  fill(source_of(folder), cache)
  (cache / 'latents' / 'manifest.json').write_bytes(content)
  with pytest.raises(UserError, match=r'latents/manifest\.json .*encode anew'):
    fill(source_of(folder), cache)


def test_unreadable_records_keep_their_rows_until_they_can_be_read(folder, tmp_path, encoded):
  cache, good = tmp_path / 'cache', (folder / '003.png').read_bytes()
  (folder / '003.png').write_bytes(good[:100])
  (folder / '006.png').write_bytes(b'')
  found = fill(source_of(folder), cache)
  assert_same(found, fill(source_of(folder), None))
  assert [i for i, row in enumerate(values(found)) if isinstance(row, str)] == [2, 5]
  encoded()
  assert_same(found, fill(source_of(folder), cache))
  assert encoded() == {'latents': 0, 'texts': 0}
  (folder / '003.png').write_bytes(good)
  assert isinstance(values(fill(source_of(folder), cache))[2], dict)
  assert encoded() == {'latents': 1, 'texts': 0}
  for path in folder.glob('*.png'):
    path.write_bytes(b'')
  with pytest.raises(UserError, match='no record can be read, the first because'):
    fill(source_of(folder), cache)


def test_views_follow_from_seed_and_content(folder, tmp_path, encoded):
  (folder / '004.txt').write_text('the left one')  # Is not mirrored.
  transforms = (RandomFlip(), RandomCrop(EDGE - 2))
  options = {'views': 6, 'transforms': transforms, 'specs': ('some',), 'seed': 5}
  found = fill(source_of(folder), tmp_path / 'cache', **options)
  assert_same(found, fill(source_of(folder), None, **options))
  pixels = lambda image: np.asarray(image, np.float32) / np.float32(127.5) - 1
  cuts = lambda image: [
    image[y : y + EDGE - 2, x : x + EDGE - 2] for y in range(3) for x in range(3)
  ]
  for i, mirrored in ((0, True), (3, False)):
    image = pixels(source_of(folder)[i]['image'])
    known = [*cuts(image), *cuts(image[:, ::-1])]
    views = [part['z'] for part in found[i]['latents']]
    which = [int(np.argmin([np.abs(view - each).max() for each in known])) for view in views]
    np.testing.assert_allclose(views, [known[w] for w in which], atol=1e-6)
    assert len(views) == 6 and len(set(which)) > 2
    assert any(w >= 9 for w in which) == mirrored
  encoded()
  write_picture(folder, 0)
  moved = fill(source_of(folder), tmp_path / 'cache', **options)
  assert encoded() == {'latents': 1, 'texts': 1}
  for a, b in zip(found[2]['latents'], moved[3]['latents'], strict=True):
    np.testing.assert_array_equal(a['z'], b['z'])
  seen = [Choose()(found[0], np.random.default_rng(i)) for i in range(60)]
  assert len({row['z'].tobytes() for row in seen}) > 2
  assert len({row['text'].tobytes() for row in seen}) == 2
  assert seen[0].keys() == {'z', 'sizes', 'text', 'mask'}


def test_captions_are_drawn_by_weight_and_any_sequence_is_a_source(tmp_path, encoded):
  """Of records in memory, which know no hashes of theirs."""
  def records(text):
    return [
      {'image': np.full((EDGE, EDGE, 3), i, np.uint8), 'captions': ['a', f'b {i}', text],
       'caption_weights': [1.0, 0.0, 3.0]} for i in range(6)
    ]

  source = records('c')
  found = fill(source, tmp_path / 'cache')
  row, texts = found[4], [part['text'].tobytes() for part in found[4]['texts']]
  assert row['texts'].weights == (1, 0, 3) and 'sizes' not in row['latents'][0]
  for seed in range(40):
    mine, other = (np.random.default_rng(seed) for _ in range(2))
    caption = ChooseCaption()(source[4], other)['caption']
    assert Choose()(row, mine)['text'].tobytes() == texts[source[4]['captions'].index(caption)]
  encoded()
  changed = records('c')
  changed[5]['caption_weights'] = [1.0, 1.0, 1.0]
  changed[0]['image'] = changed[0]['image'] + np.uint8(9)
  assert fill(changed, tmp_path / 'cache')[5]['texts'].weights == (1, 1, 1)
  assert encoded() == {'latents': 1, 'texts': 1}


def test_room_is_looked_for_before_work(folder, tmp_path, monkeypatch, encoded):
  usage = types.SimpleNamespace(free=1000)
  monkeypatch.setattr(disk.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(UserError, match='latents of 11 records need about') as error:
    fill(source_of(folder), tmp_path / 'cache', shape=(EDGE, EDGE))
  assert '0.0 GB free' in str(error.value) and encoded()['latents'] == 0


@pytest.mark.parametrize('data', [
  b'', b'\xff\xff\xff\xff', b'\x02\0\0\0{}xx', pack({'a': np.zeros(4, np.float32)})[:-1],
  pack({'a': np.zeros(4, np.int32)}) + b'x', b'\x08\0\0\0"abcdef"', b'\x04\0\0\0[[1]',
  pack({'a': np.zeros(2, np.float32)}).replace(b'[2]', b'[9]'),
  pack({'a': np.zeros(2, np.float32)}).replace(b'"float32", [2]', b'"float32",[-2]'),
  pack({'a': np.zeros(2, np.float32)}).replace(b'float32', b'object_'),
])
def test_a_part_is_checked_before_it_is_read(data):
  with pytest.raises((ValueError, TypeError)):
    unpack(data)


SLOW = """
import sys, time
from pathlib import Path
from tests.data import cached
from diffusion_jax.data.cache import encoding
encoding._MOST_ROWS = 1
take = encoding.Latents.encode
def encode(self, numbers):
  time.sleep(0.05)
  return take(self, numbers)
encoding.Latents.encode = encode
print('ready', flush=True)
cached.fill(cached.source_of(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(folder, tmp_path):
  """With real kills; at the end every byte is as if there had been none."""
  def start(cache):
    process = subprocess.Popen(
      [sys.executable, '-c', SLOW, str(folder), str(cache)], cwd=tiny.ROOT, text=True,
      env=tiny.environment('', devices=1), stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == 'ready\n'
    return process

  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  assert start(whole).wait() == 0
  kills, files = 0, 0
  written = lambda: len(list(cut.rglob('*.array_record')))
  for more in (1, 2, 0):  # Files that the process may write before it is killed.
    process = start(cut)
    while written() < files + more and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
    assert written() >= files + more
    files = written()
  assert kills == 3 and files < len(list(whole.rglob('*.array_record')))
  assert start(cut).wait() == 0
  assert records_in(cut) == records_in(whole)
  assert json.loads((cut / 'latents' / 'manifest.json').read_text())['complete']
