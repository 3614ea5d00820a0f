"""Every kind of source of pictures gives the same stream of examples; what is wrong is named."""

import itertools
import pickle

import numpy as np
import pytest

from diffusion_jax.__main__ import main
from diffusion_jax.data.loader import Loader
from diffusion_jax.data.splits import APART
from diffusion_jax.data.transforms import build_transforms
from diffusion_jax.data.unreadable import Counted, Damage, captions_of
from diffusion_jax.errors import UserError
from tests.data import kinds
from tests.train.test_unreadable_pictures import bomb

KINDS = {'folder': kinds.as_folder, 'records': kinds.as_records, 'tar': kinds.as_tar,
         'parquet': kinds.as_parquet, 'arrow': kinds.as_arrow, 'tfds': kinds.as_tfds}


@pytest.fixture(scope='module')
def pictures(sources):
  return kinds.openmoji(sources)


@pytest.fixture(scope='module')
def written(pictures, tmp_path_factory):
  """Kind -> data.dataset of these pictures."""
  root = tmp_path_factory.mktemp('kinds')
  return {kind: write(root / kind, pictures) for kind, write in KINDS.items()}


def stream(source, count=8):
  transforms = build_transforms(['random_flip', 'choose_caption', 'normalize'])
  loader = Loader(source, transforms, batch_size=6, seed=3, num_threads=0)
  return list(itertools.islice(loader, count))


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'folder'])
@pytest.mark.parametrize('size', [16, (16, 24)])
def test_the_same_examples(written, pictures, kind, size):
  """In the same order, split alike, with the same sizes and hashes, also of parts and by pickle."""
  theirs, ours = (kinds.opened(written[each], size, test_fraction=0.3)
                  for each in ('folder', kind))
  for expected, found in zip(theirs, ours, strict=True):
    assert len(found) == len(expected) and 0 < len(found) < len(pictures)
    np.testing.assert_array_equal(found.original_sizes(), expected.original_sizes())
    np.testing.assert_array_equal(found.hashes(), expected.hashes())
    assert found.measured == expected.measured
    found = pickle.loads(pickle.dumps(found))
    for a, b in zip(stream(expected), stream(found), strict=True):
      assert a.keys() == b.keys() and a['id'] == b['id'] and a['caption'] == b['caption']
      np.testing.assert_array_equal(a['image'], b['image'])
      np.testing.assert_array_equal(a['sizes'], b['sizes'])
    shapes = np.resize([(8, 16), (16, 8), (12, 12)], (len(found), 2))
    for i in (0, 1, 2, len(found) - 1):
      a, b = (each.at_sizes(shapes)[i] for each in (expected, found))
      np.testing.assert_array_equal(a['image'], b['image'])
      assert a['image'].shape == (*shapes[i], 3)
  print_ = ours[0].fingerprint()
  assert print_ == kinds.opened(written[kind], size, test_fraction=0.3)[0].fingerprint()
  assert print_ != ours[1].fingerprint()


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'records'])
def test_prepared_it_is_the_same_stream(written, tmp_path, kind):
  out, options = tmp_path / 'set', {'test_fraction': 0.3}
  assert main(['prepare', '--source', written[kind], '--out', str(out), '--workers', '1',
               '--test_fraction', '0.3', '--shards', '3']) == 0
  both = [kinds.opened(each, **options) for each in (f'records:{out}', written[kind])]
  ours, theirs = (test.measured.sentence for _, test in both)
  assert ours.startswith(theirs)  # Pictures that look alike may be said, too.
  for found, expected in zip(*both, strict=True):
    assert len(found) == len(expected)
    np.testing.assert_array_equal(found.hashes(), expected.hashes())
    for a, b in zip(stream(found, 3), stream(expected, 3), strict=True):
      assert a['id'] == b['id'] and a['caption'] == b['caption']
      np.testing.assert_array_equal(a['image'], b['image'])


def bad(pictures):
  """(pictures of which some are bad, cause of each by its name)."""
  whole = next(picture for _, picture, _ in pictures if kinds.suffix(picture) == '.png')
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0x55
  found = {
    'empty': b'', 'truncated': whole[: len(whole) // 2], 'damaged': bytes(flipped),
    'too large': bomb(100_000), 'no picture': b'a text', 'zero size': bomb(0), 'no caption': whole,
  }
  named = [(f'0{cause.replace(" ", "-")}', picture, [] if cause == 'no caption' else ['bad'])
           for cause, picture in found.items()]
  return sorted(pictures[:24] + named), {f'0{cause.replace(" ", "-")}': cause for cause in found}


@pytest.mark.parametrize('kind', KINDS)
def test_bad_records_are_named_by_cause_and_replaced(pictures, tmp_path, kind):
  mixed, causes = bad(pictures)
  if kind == 'folder':  # There it is refused at the start, by name.
    mixed = [each for each in mixed if causes.get(each[0]) != 'no caption']
    del causes['0no-caption']
  dataset, said = KINDS[kind](tmp_path / 'data', mixed), []
  train, _ = kinds.opened(dataset, test_fraction=0, data_dir=str(tmp_path / 'cache'))
  assert len(train) == len(mixed)
  streams = []
  for threads in (0, 2):
    damage = Damage(said.append)
    source = Counted(train, 0.5, damage, 'training records')
    loader = Loader(source, (), batch_size=len(mixed), seed=0, num_threads=threads)
    streams.append([next(loader)['id'] for _ in range(2)])
    assert damage.causes == dict.fromkeys(causes.values(), 1)
    assert all(any(name in text for text in damage.sentences) for name in causes)
  assert streams[0] == streams[1] and len(said) == 2 * len(causes)
  assert not {*causes} & {name for names in streams[0] for name in names}
  sizes = train.original_sizes()
  unknown = {name for (name, *_), size in zip(mixed, sizes, strict=True) if not size.any()}
  assert {'0empty', '0no-picture', '0too-large', '0zero-size'} <= unknown
  assert unknown <= {*causes} - {'0no-caption'}  # What is kept is of the pictures alone.
  few = Loader(Counted(train, 0.1, Damage(), 'training records'), (), batch_size=len(mixed), seed=0)
  with pytest.raises(UserError, match=r'training records cannot be read, more than .* 0\.1'):
    next(few)


def both_splits(kind, folder, train, test):
  """data.dataset of a kind with splits of its own."""
  if kind == 'tfds':
    return kinds.as_tfds(folder, train, test)
  if kind == 'records':
    written = {split: kinds.as_shards(folder, part, split=split)
               for split, part in (('train', train), ('test', test))}
    kinds.write_header(folder, written)
    return f'records:{folder}'
  for split, part in (('train', train), ('test', test)):
    KINDS[kind](folder / split, part)
  return f'{kind}:{folder}'


@pytest.mark.parametrize('kind', KINDS)
def test_pictures_on_both_sides_of_own_splits_are_told(pictures, tmp_path, monkeypatch, kind):
  train = pictures[:20]
  test = [*pictures[20:30], ('0same', pictures[3][1], ['x']), ('1same', pictures[4][1], ['y'])]
  apart = both_splits(kind, tmp_path / 'apart', train, test[:10])
  assert kinds.opened(apart)[1].measured == APART
  dataset = both_splits(kind, tmp_path / 'data', train, test)
  told = 'On the test split, of whose 12 pictures 2 are trained on, too.'
  assert kinds.opened(dataset)[1].measured.sentence == told
  monkeypatch.setattr(type(kinds.opened(dataset)[1].entries), 'quick', 1)
  monkeypatch.setenv('DIFFUSION_JAX_DATA', str(tmp_path / 'new'))
  said = kinds.opened(dataset)[1].measured
  assert said.sentence == told if kind == 'records' else 'prepare --source does' in said.sentence
  assert not said.trained_on


@pytest.mark.parametrize('kind', KINDS)
def test_texts_are_read_without_pictures(pictures, tmp_path, monkeypatch, kind):
  """Also where no picture can be decoded: a vocabulary is made of them."""
  made = [(name, b'\x89PNG no picture', captions) for name, _, captions in pictures[:24]]
  train, _ = kinds.opened(KINDS[kind](tmp_path / 'data', made), test_fraction=0)
  source = Counted(train, 1.0, Damage(), 'records')
  monkeypatch.setattr('diffusion_jax.data.sources.pictures.here', None)
  train._call = None  # Whatever decodes a picture.
  read = train.entries.read
  if kind in ('tar', 'parquet', 'arrow'):  # Not even its bytes are fetched.
    monkeypatch.setattr(type(train.entries), '__getitem__', None)
  assert list(captions_of(source)) == [captions for _, _, captions in made]
  assert list(captions_of(source, [3, 1])) == [made[3][2], made[1][2]]
  assert [source.about(i)['id'] for i in range(24)] == [name for name, *_ in made]
  monkeypatch.undo()
  assert read(0) == made[0][1]


@pytest.mark.parametrize('kind', ['tar', 'parquet', 'records'])
def test_remote_files(written, tmp_path, kind):
  """Through fsspec, here of files in memory: the same examples, and nothing but parts is read."""
  import fsspec

  memory, name = fsspec.filesystem('memory'), written[kind].partition(':')[2]
  memory.put(name, f'/bucket/{kind}', recursive=True)
  options = {'test_fraction': 0.3, 'data_dir': str(tmp_path)}
  ours = kinds.opened(f'{kind}:memory://bucket/{kind}', **options)
  theirs = kinds.opened(written[kind], **options)
  for a, b in zip(ours, theirs, strict=True):
    assert len(a) == len(b) and (a.hashes() == b.hashes()).all()
    for x, y in zip(stream(pickle.loads(pickle.dumps(a)), 2), stream(b, 2), strict=True):
      assert x['id'] == y['id'] and (x['image'] == y['image']).all()
  with pytest.raises(UserError, match='memory://bucket/none'):
    kinds.opened(f'{kind}:memory://bucket/none', **options)
  with pytest.raises(UserError, match=r'cannot be opened .*install what it needs'):
    kinds.opened(f'{kind}:nothing://bucket/none', **options)
