"""Tar files whose headers lie: bounded in memory and time, and what cannot be read is named."""

import io
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.image_sets import TarPictures
from diffusion_jax.errors import UserError

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def _png():
  buffer = io.BytesIO()
  Image.fromarray(PIXELS).save(buffer, 'png')
  return buffer.getvalue()


PNG = _png()


def header(name, size=0, kind=tarfile.REGTYPE, **values):
  info = tarfile.TarInfo(name)
  info.size, info.type = size, kind
  for key, value in values.items():
    setattr(info, key, value)
  return info.tobuf(tarfile.GNU_FORMAT, 'utf-8', 'surrogateescape')


def member(name, data=PNG, kind=tarfile.REGTYPE):
  return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax(**records):
  lines = b''
  for key, value in records.items():
    text = f' {key.replace("__", ".")}={value}\n'.encode()
    size = len(text) + len(str(len(text) + 3))
    lines += str(size).encode() + text
  return member('x', lines, tarfile.XHDTYPE)


def resealed(block, at, data):
  """A header with other bytes at a place and a checksum that fits them."""
  block = bytearray(block)
  block[at : at + len(data)] = data
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block[:512])
  return bytes(block)


def base256(number):
  return b'\xff' + (number & (2**88 - 1)).to_bytes(11, 'big')


SOUND = member('a.png')
LINK = member('././@LongLink', b'long.png\0', tarfile.GNUTYPE_LONGNAME)
TAILS = {
  'chain_of_long_names': LINK * 2000 + member('b.png'),
  'name_of_2_MB': member('x', b'y' * 2**21, tarfile.GNUTYPE_LONGNAME) + member('b.png'),
  'name_of_a_terabyte': header('x', 2**40, tarfile.GNUTYPE_LONGNAME) + member('b.png'),
  'chain_of_pax': pax(path='c.png') * 2000 + member('b.png'),
  'pax_without_end': header('x', 2**40, tarfile.XHDTYPE) + member('b.png'),
  'pax_size_below_0': pax(size=-100_000) + member('b.png'),
  'pax_size_in_words': pax(size='many') + member('b.png'),
  'pax_of_no_records': member('x', b'9' * 5000 + b' a=b\n', tarfile.XHDTYPE) + member('b.png'),
  'pax_sparse_map': pax(GNU__sparse__map='0,1,' * 40_000 + '0,x') + member('b.png'),
  'pax_sparse_without_end': pax(
    GNU__sparse__major=1, GNU__sparse__minor=0, GNU__sparse__name='c.png',
    GNU__sparse__realsize=2**40) + member('b.png', b'999999999\n' + b'7\n' * 200),
  'sparse_without_end': resealed(
    header('b.png', 512, tarfile.GNUTYPE_SPARSE), 482, b'\1'),
  'size_below_0': resealed(header('b.png'), 124, base256(-2048)) + PNG,
  'size_that_leads_back': resealed(header('b.png'), 124, base256(-512)) + PNG,
  'size_beyond_all_files': resealed(header('b.png'), 124, base256(2**80)) + PNG,
  'no_header': bytes(range(1, 256)) * 10,
}


@pytest.mark.parametrize('tail', TAILS)
def test_lying_headers_cost_neither_time_nor_memory_and_what_is_before_is_read(tmp_path, tail):
  path = tmp_path / 'x.tar'
  with path.open('wb') as file:
    file.write(SOUND + TAILS[tail])
    file.truncate(2**33)  # There is as much as any header claims, and it takes no room.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  pictures = TarPictures([path])
  np.testing.assert_array_equal(pictures[0], PIXELS)
  if not tail.startswith('pax_sparse_map'):
    with pytest.raises(UserError, match=r'x\.tar') as caught:
      for i in range(1, len(pictures) + 1):
        print(pictures[i] if i < len(pictures) else '')
    assert str(caught.value).isprintable()
  assert len(pictures) <= 3
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_links_and_devices_with_names_of_pictures_are_counted_and_named(tmp_path):
  kinds = {'link': tarfile.SYMTYPE, 'hard': tarfile.LNKTYPE, 'pipe': tarfile.FIFOTYPE,
           'device': tarfile.CHRTYPE}
  data = SOUND + b''.join(
    header(f'{name}.png', kind=kind, linkname='../../a.png') for name, kind in kinds.items()
  ) + header('folder.png', kind=tarfile.DIRTYPE) + member('b.png')
  path = tmp_path / 'x.tar'
  path.write_bytes(data + bytes(1024))
  pictures = TarPictures([path])
  assert len(pictures) == 2
  for picture in pictures:
    np.testing.assert_array_equal(picture, PIXELS)
  (note,) = pictures.notes
  assert 'links in tar files: 2, such as link.png' in note
  assert 'what is no regular file in tar files: 2, such as pipe.png' in note


def test_names_are_only_names(tmp_path):
  names = ['../../etc/a.png', '/dev/zero.png', 'a\nb\x1b[2J.png', 'x' * 5000 + '.png',
           'é\udcff.png']
  path = tmp_path / 'x.tar'
  with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as archive:
    for name in names:
      info = tarfile.TarInfo(name)
      info.size = len(PNG) - 40
      archive.addfile(info, io.BytesIO(PNG))
  pictures = TarPictures([path])
  assert len(pictures) == len(names)
  for index in range(len(names)):
    with pytest.raises(UserError, match=r'x\.tar') as caught:
      pictures[index]
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
  assert [*tmp_path.iterdir()] == [path]
