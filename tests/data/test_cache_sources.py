"""Caches of mixtures and buckets; open files, shares of processes, and what is told meanwhile."""

import os
import resource

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.config import DataConfig, typed
from diffusion_jax.data.buckets import in_buckets
from diffusion_jax.data.cache import (
  Choose,
  Options,
  cached_source,
  encoding,
  files,
  identity,
  store,
)
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.mixture import ByPart, Mixture, Worded
from diffusion_jax.data.sources import open_data
from diffusion_jax.data.transforms import (
  ChooseCaption,
  FirstCaption,
  build_transforms,
)
from diffusion_jax.mixture import PartConfig
from diffusion_jax.parallel.mesh import MeshConfig, make_mesh
from diffusion_jax.pixels import to_float
from diffusion_jax.train.tasks.diffusion import looks, seen
from tests import tiny
from tests.data.cached import (
  A_FILE,
  COUNT,
  EDGE,
  Letters,
  fill,
  model_of,
  source_of,
  write_picture,
)

pytestmark = pytest.mark.usefixtures('small_files')


def test_a_mixture_is_cached_once_and_read_as_it_is_without(folder, tmp_path, encoded):
  """Each record once, however often it is read; captions with the words of their part."""
  (tmp_path / 'more').mkdir()
  for number in range(50, 54):
    write_picture(tmp_path / 'more', number)
  parts = {'a': Worded(source_of(folder), 'sks, ', ''), 'b': source_of(tmp_path / 'more')}
  source = Mixture(parts, {name: PartConfig(name, weight=1.0) for name in parts})
  cache = fill(source, tmp_path / 'cache')
  assert encoded() == {'latents': COUNT + 4, 'texts': COUNT + 4}
  fill(source, tmp_path / 'cache')
  assert encoded() == {'latents': 0, 'texts': 0}
  options = {'batch_size': 4, 'seed': 0, 'num_threads': 0}
  cached, read = Loader(cache, [Choose()], **options), Loader(source, [FirstCaption()], **options)
  for _ in range(6):
    mine, theirs = next(cached), next(read)
    assert mine['part'] == theirs['part']
    assert [text.startswith('sks, ') for text in theirs['caption']] == [
      part == 'a' for part in mine['part']
    ]
    pixels = to_float(theirs['image'])
    np.testing.assert_allclose(mine['z'], pixels, atol=1e-6)
  assert {*mine['part']} == {'a', 'b'}


def test_pictures_of_two_parts_are_told_apart_by_how_these_make_them_look(tmp_path, encoded):
  """They lie in equal files of both parts; another look of one part is encoded alone."""
  (tmp_path / 'clear').mkdir()
  for i in range(A_FILE):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (EDGE, EDGE, 4), np.uint8)).save(
      tmp_path / 'clear' / f'{i}.png'
    )
    (tmp_path / 'clear' / f'{i}.txt').write_text(f'{i}')
  colors = {'a': 'white', 'b': 'red', 'c': 'white'}
  mirrored = [['random_flip', {'probability': 1.0}]]

  def filled(**transforms):
    mixed = {
      n: {'dataset': f'folder:{tmp_path / "clear"}', 'background': color,
          'transforms': transforms.get(n, [])} for n, color in colors.items()
    }
    config = typed(DataConfig, {'dataset': '', 'size': EDGE, 'test_fraction': 0, 'mixture': mixed})
    by_part = ByPart({n: build_transforms(part.transforms) for n, part in config.mixture.items()})
    source = open_data(config)[0]
    found = fill(source, tmp_path / 'cache', specs=seen(config), looks=looks(config),
                 transforms=[by_part])
    drawn = Loader(source, [by_part], batch_size=1, seed=0, num_threads=0)
    cached = Loader(found, [Choose()], batch_size=1, seed=0, num_threads=0)
    for _ in range(len(source)):
      np.testing.assert_allclose(next(cached)['z'], to_float(next(drawn)['image']), atol=1e-6)
    return encoded()['latents']

  assert filled() == 3 * A_FILE
  assert filled(c=mirrored) == A_FILE and filled(c=mirrored) == 0
  colors['a'] = 'blue'
  assert filled(c=mirrored) == A_FILE


def test_a_bucket_in_which_nothing_can_be_read_goes_over_to_others(folder, tmp_path, encoded):
  """As without a cache, and encoded once; the pictures' sizes can be read."""
  for number in (20, 21):
    write_picture(folder, number, (EDGE, 2 * EDGE))
    path = folder / f'{number:03}.png'
    path.write_bytes(path.read_bytes()[:100])
  shapes = ((EDGE, EDGE), (EDGE // 2, EDGE))
  source = in_buckets(source_of(folder, shapes), shapes)
  cache = fill(source, tmp_path / 'cache')
  assert encoded() == {'latents': COUNT + 2 + COUNT + 2, 'texts': COUNT + 2}
  options = {'batch_size': 2, 'seed': 0, 'num_threads': 0}
  memory, cached = (Loader(each, [Choose()], **options) for each in (fill(source, None), cache))
  read = Loader(source, [ChooseCaption()], **options)
  seen, wide = set(), set()
  for _ in range(40):
    mine, theirs, wanted = next(cached), next(memory), next(read)
    np.testing.assert_allclose(mine['z'], to_float(wanted['image']), atol=1e-6)
    np.testing.assert_array_equal(theirs['z'], mine['z'])
    texts = Letters().encode({}, {'tokens': Letters().tokens(wanted['caption'])})['text']
    np.testing.assert_allclose(mine['text'], texts, atol=1e-3)
    seen.add(mine['z'].shape[1:3])
    wide |= {*wanted['id']} if wanted['image'].shape[1:3] == shapes[1] else set()
  assert seen == {*shapes} and len(wide) > 5
  encoded()
  fill(source, tmp_path / 'cache')
  assert encoded() == {'latents': 0, 'texts': 0}


def test_files_stay_open_as_far_as_the_system_lets_them(folder, tmp_path, monkeypatch):
  """A quarter of the limit, which is raised where it may be, and 4,096 at most."""
  limits, raised = [1024, 10**6], []
  monkeypatch.setattr(resource, 'getrlimit', lambda kind: tuple(limits))
  monkeypatch.setattr(resource, 'setrlimit', lambda kind, pair: raised.append(pair))
  assert files.most_open() == 4096 and raised == [(16_384, 10**6)]
  limits[:] = [2**20, 2**20]
  assert files.most_open() == 4096 and len(raised) == 1
  limits[:] = [100, 400]
  assert files.most_open() == 100 and raised[1:] == [(400, 400)]
  limits[:] = [8, 8]
  monkeypatch.setattr(encoding, '_MOST_ROWS', 1)
  cache = fill(source_of(folder), tmp_path / 'cache')
  mine = lambda: sum('cache/latents' in os.path.realpath(f'/proc/self/fd/{fd}')
                     for fd in os.listdir('/proc/self/fd'))
  for _ in range(2):
    for row in cache.kinds['latents']:
      assert row[0]['z'].shape == (EDGE, EDGE, 3)
      assert mine() <= 4  # That of the last row, and one that has just been let go, too.
  assert len(list((tmp_path / 'cache' / 'latents').glob('*.array_record'))) == COUNT


def test_a_process_finds_the_digests_of_its_share(folder, monkeypatch):
  """Contents and texts, of which the others tell; read for all but one, as two processes would."""
  source, asked, told = source_of(folder), [], []
  wanted = identity.of_pictures(source, True), identity.of_texts(source, ())
  monkeypatch.setattr(identity, 'gather_bytes', lambda data: [told.append(data) or data])
  monkeypatch.setattr(identity, 'in_step', lambda name, work, *_: work())
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  read = type(source.entries).hash
  monkeypatch.setattr(
    type(source.entries), 'hash', lambda self, i: (asked.append(i), read(self, i))[1]
  )
  for process in (0, 1):
    monkeypatch.setattr(jax, 'process_index', lambda: process)  # noqa: B023
    identity.of_pictures(source, True)
    assert sorted(asked) == [*range(6)] if process == 0 else [*range(6, COUNT)]
    asked.clear()
    identity.of_texts(source, ())
  for found, whole in ((told[0::2], wanted[0]), (told[1::2], wanted[1])):
    assert b''.join(found) == whole.tobytes()


def test_it_is_told_how_far_the_work_is(folder, tmp_path, capsys, monkeypatch):
  said = []
  monkeypatch.setattr(store, '_A_LINE', 0.0)
  with tiny.few_devices():
    cached_source(
      source_of(folder), model_of(), {'factor': {'bias': np.ones(1, np.float32)}},
      make_mesh(MeshConfig()), folder=tmp_path, options=Options(
        report=lambda state, now=False, **more: said.append((state, now, more))
      ),
    )
  assert {state for state, _, _ in said} == {'encoding'}
  said = [one for one in said if 'encoding' in one[2]]  # Others are before it looks at contents.
  found = [(more['encoding']['kind'], now, more['encoding']['records']) for _, now, more in said]
  assert found == [
    (kind, n == 0, n) for kind in ('latents', 'texts') for n in (0, A_FILE, 2 * A_FILE, COUNT)
  ]
  last = said[3][2]
  assert last['encoding']['of'] == COUNT and last['encoding']['records_per_second'] > 0
  assert last['message'].startswith('encoding latents: 11 of 11 records (')
  assert 'encoding texts: 8 of 11 records (' in capsys.readouterr().err
