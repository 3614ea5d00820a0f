"""Sets of images by what is at a path, and what is damaged in them."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.image_sets import ImageBatch
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.extract import Made, reader
from diffusion_jax.evaluation.images import Split, open_images
from diffusion_jax.evaluation.pieces import Keeper
from diffusion_jax.evaluation.reference import open_reference
from tests import tiny

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (6 + i, 9, 3), np.uint8) for i in range(5)]


def _png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def _entry(name, size, **changes):
  entry = tarfile.TarInfo(name)
  entry.size = size
  for key, value in changes.items():
    setattr(entry, key, value)
  return entry


def _tar(path, members, **options):
  with tarfile.open(path, 'w', **options) as archive:
    for name, data in members:
      archive.addfile(_entry(name, len(data)), io.BytesIO(data))


def _pixels(images):
  return [images[i].pixels for i in range(len(images))]


def _same(found, wanted):
  assert len(found) == len(wanted)
  for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_tar_files_as_evaluate_keeps_them(tmp_path):
  keep = Keeper(tmp_path / 'kept', 'tar')
  keep(range(3, 5), Made(IMAGES[3:], ['', '']))
  keep(range(0, 3), Made(IMAGES[:3], ['', '', '']))
  images = open_images(tmp_path / 'kept')
  assert images.name == f'tar:{tmp_path}/kept'
  _same(_pixels(images), IMAGES)
  _same(reader(images)(range(1, 4)).images, IMAGES[1:4])
  one = open_images(str(tmp_path / 'kept' / '000003-000004.tar'))
  _same(_pixels(one), IMAGES[3:])


def test_members_that_are_no_pictures_and_names_that_lead_elsewhere(tmp_path):
  outside = tmp_path / 'outside.png'
  outside.write_bytes(_png(IMAGES[4]))
  folder = tmp_path / 'shards'
  folder.mkdir()
  long = 'x' * 150  # Too long for the header: a record of its own comes before.
  with tarfile.open(folder / 'a.tar', 'w') as archive:
    for name in ('../../escaped.png', '/absolute.png', f'{long}/long.PNG', 'text.txt', 'b/._m.png'):
      data = b'a caption' if name.endswith('txt') else _png(IMAGES[0])
      archive.addfile(_entry(name, len(data)), io.BytesIO(data))
    archive.addfile(_entry('folder.png', 0, type=tarfile.DIRTYPE))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
      archive.addfile(_entry('link.png', 0, type=kind, linkname=str(outside)))
  before = sorted(tmp_path.rglob('*'))
  images = open_images(folder)
  _same(_pixels(images), IMAGES[:1] * 3)
  assert sorted(tmp_path.rglob('*')) == before  # Nothing was unpacked.


def _errors(images):
  made = reader(images)(range(len(images)))
  assert [image is None for image in made.images] == [text != '' for text in made.errors]
  return [text for text in made.errors if text], [x for x in made.images if x is not None]


def test_a_tar_file_that_is_cut(tmp_path):
  path = tmp_path / 'a.tar'
  _tar(path, [(f'{i}.png', _png(image)) for i, image in enumerate(IMAGES)])
  whole = path.read_bytes()
  images = open_images(path)
  third = images.pictures.members[2]
  for size, named in (
    (third.offset + third.size // 2, '2.png in '),  # Within the pixels,
    (third.offset + third.size - 2, '2.png in '),  # behind them, which Pillow would not notice,
    (third.offset - 100, 'what follows 1.png in '),  # within the header,
    (third.offset - 512, 'what follows 1.png in '),  # between two members.
  ):
    path.write_bytes(whole[:size])
    errors, good = _errors(open_images(path))
    assert errors and all(str(path) in text for text in errors)
    assert named in errors[0]
    _same(good, IMAGES[:2])
  for damage in (third.offset - 512 + 150, third.offset + 30):
    data = bytearray(whole)
    data[damage] ^= 255
    path.write_bytes(data)
    errors, good = _errors(open_images(path))
    assert len(errors) == 1
    _same(good, IMAGES[:2] if damage < third.offset else [*IMAGES[:2], *IMAGES[3:]])


def test_a_tar_file_that_lies_about_sizes(tmp_path):
  path = tmp_path / 'a.tar'
  _tar(path, [('0.png', _png(IMAGES[0])), ('1.png', _png(IMAGES[1]))])
  data = bytearray(path.read_bytes())
  at = open_images(path).pictures.members[1].offset - 512
  header = tarfile.TarInfo.frombuf(data[at : at + 512], 'utf-8', 'strict')
  header.size = 2**40
  data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
  path.write_bytes(data)
  errors, good = _errors(open_images(path))
  assert '1.png' in errors[0] and '1,099,511,627,776 bytes' in errors[0]
  _same(good, IMAGES[:1])
  buffer = io.BytesIO()
  Image.new('1', (20_000, 20_000)).save(buffer, 'PNG')
  _tar(path, [('small.png', buffer.getvalue())])
  errors, _ = _errors(open_images(path))
  assert f'the image small.png in {path} has 20000 x 20000 pixels' in errors[0]


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_reference_batches(tmp_path, save):
  stack = RNG.integers(0, 256, (7, 20, 30, 3), np.uint8)
  path = tmp_path / 'batch.npz'
  save(path, mu=np.zeros(3), sigma=np.eye(3), arr_0=stack, arr_1=np.arange(7))
  images = open_images(path)
  assert images.name == f'npz:{path}'
  _same(_pixels(images), stack)
  _same(reader(images)(range(7)).images, stack)
  assert (images.pictures._images is None) == (save is np.savez)  # Only unpacked where packed.
  data = bytearray(path.read_bytes())
  data[path.stat().st_size // 3] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match=r'batch\.npz is not a whole npz with images as arr_0'):
    open_images(path)


def test_damaged_batches_of_images_are_named(tmp_path):
  stack, path = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8), tmp_path / 'batch.npz'
  for save in (np.savez, np.savez_compressed):
    save(path, stack)
    whole = path.read_bytes()
    for data in (whole[:-100], whole[:300], b''):
      path.write_bytes(data)
      with pytest.raises(UserError, match=r'batch\.npz'):
        ImageBatch(path)
    path.write_bytes(whole)
    images = ImageBatch(path)
    np.testing.assert_array_equal(images[-1], stack[-1])
    images = ImageBatch(path)
    path.write_bytes(whole[:300])  # Lost behind our back.
    with pytest.raises(UserError, match=r'batch\.npz can no longer be read'):
      print(images[2])
  with pytest.raises(UserError, match='no images at'):
    ImageBatch(tmp_path / 'none.npz')


def test_a_prepared_data_set(small_data, sources, tmp_path):
  (file,) = Path(small_data).glob(f'openmoji/{tiny.SIZE}/*/features.json')
  folder = file.parent
  images = open_images(f'{folder}:test')
  assert images.name == f'prepared:{folder.resolve()}:test'
  _same(_pixels(images), [sources[1][i]['image'] for i in range(len(sources[1]))])
  assert len(open_images(f'{folder}:train[:10]')) == 10
  with pytest.raises(UserError, match=r'has the splits test, train; give .*:train\.$'):
    open_images(folder)
  with pytest.raises(UserError, match="has no split 'dev'; use one of test, train"):
    open_images(f'{folder}:dev')
  copy = shutil.copytree(folder, tmp_path / 'copy')
  (records,) = copy.glob('*test*array_record*')
  data = bytearray(records.read_bytes())
  data[np.flatnonzero(np.frombuffer(data, np.uint8))[2000]] ^= 1  # Within some record.
  records.write_bytes(data)
  errors, good = _errors(open_images(f'{copy}:test'))
  assert len(good) + len(errors) == len(sources[1]) and len(errors) == 1
  assert f' of test in {copy} cannot be read (Corrupted' in errors[0]
  records.write_bytes(b'')
  with pytest.raises(UserError, match='cannot be read'):
    print(open_images(f'{copy}:test')[0])
  (copy / 'features.json').write_text('{')
  with pytest.raises(UserError, match=r'features\.json is not readable JSON .*prepare the'):
    open_images(f'{copy}:test')


def test_folders_behind_links_and_what_is_left_out(tmp_path):
  root, other = tmp_path / 'set', tmp_path / 'other'
  for i, folder in enumerate((root / 'in' / 'in', other, other / 'in')):
    folder.mkdir(parents=True)
    Image.fromarray(IMAGES[i]).save(folder / f'{i}.png')
  (root / 'link').symlink_to(other)
  (other / 'back').symlink_to(root)
  (root / 'gone.png').symlink_to('nowhere.png')
  (root / '._0.png').write_bytes(b'x')
  os.mkfifo(root / 'pipe.png')
  images = open_images(root)
  _same(_pixels(images), [IMAGES[0], IMAGES[1], IMAGES[2]])
  assert images.notes == (
    f'of {root} not everything is used: hidden files: 1, such as ._0.png; links that lead nowhere: '
    '1, such as gone.png; pipes, sockets and devices: 1, such as pipe.png; links to folders that '
    'are read already, or above: 1, such as link/back.',
  )
  assert open_reference(str(root), {})[2] == [*images.notes]
  with pytest.raises(UserError, match=r'no images in .* \(of .*hidden files: 1, such as \._a\.png'):
    (tmp_path / 'hidden').mkdir()
    (tmp_path / 'hidden' / '._a.png').write_bytes(b'x')
    open_images(tmp_path / 'hidden')


def test_a_split_of_other_pictures_has_another_stamp(tmp_path):
  """By which features that were made before are not taken for those of the new pictures."""
  for i in range(3):
    Image.fromarray(IMAGES[i]).save(tmp_path / f'{i}.png')
  opened = lambda: tiny.folder_sources(tmp_path, caption='x')[0]
  in_memory = lambda: [opened()[i] for i in range(3)]
  stamps = lambda: [Split(records, 'it').stamp for records in (opened(), in_memory())]
  before = stamps()
  assert stamps() == before and before[0] != before[1]
  Image.fromarray(IMAGES[3]).save(tmp_path / '1.png')
  assert all(new != old for new, old in zip(stamps(), before, strict=True))


def test_what_is_none_of_these(tmp_path):
  cases = {
    'none': "there are no images at .*none; give a folder of pictures .*, a tar file or .* ADM's",
    'empty': 'there are no images in .*empty; give a folder',
    'text.txt': r'text\.txt holds no images; give a folder',
    'statistics.npz': r'statistics\.npz holds no images; give',
    'both': 'both has both pictures and tar files; move one kind elsewhere',
    'words.tar': r'words\.tar is not an uncompressed tar file',
    'packed.tar': r'packed\.tar is not an uncompressed tar file',
    'texts.tar': r'there is no picture .* in .*texts\.tar',
    'grey.npz': r'arr_0 in .*grey\.npz is not uint8 \[n h w 3\]',
    'floats.npz': r'arr_0 in .*floats\.npz is not uint8',
  }
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'both').mkdir()
  (tmp_path / 'both' / 'a.png').write_bytes(_png(IMAGES[0]))
  _tar(tmp_path / 'both' / 'b.tar', [('b.png', _png(IMAGES[0]))])
  for name in ('text.txt', 'words.tar'):
    (tmp_path / name).write_text('a picture of a cat')
  np.savez(tmp_path / 'statistics.npz', mu=np.zeros(3), sigma=np.eye(3))
  with tarfile.open(tmp_path / 'packed.tar', 'w:gz') as archive:
    archive.addfile(_entry('a.png', 4), io.BytesIO(b'abcd'))
  _tar(tmp_path / 'texts.tar', [('a.txt', b'a')])
  np.savez(tmp_path / 'grey.npz', np.zeros((2, 4, 4), np.uint8))
  np.savez(tmp_path / 'floats.npz', np.zeros((2, 4, 4, 3), np.float32))
  for name, text in cases.items():
    with pytest.raises(UserError, match=text):
      open_images(tmp_path / name)
