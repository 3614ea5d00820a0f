"""Headers of tar files by their layout are what Python's tarfile says, or are left to it."""

import contextlib
import io
import itertools
import tarfile

import numpy as np
import pytest

from diffusion_jax.data import tar_headers, tars
from diffusion_jax.data.finding import Left
from diffusion_jax.errors import UserError

SUFFIXES = ('.png', '.txt')
NAMES = ['a.png', 'b/c.PNG', './d.png', 'e//f.txt', '/g.png', '../h.png', '.i.png', 'j.bin',
         'ä/ö.png', 'x' * 96 + '.png', 'y' * 97 + '.png', 'p/' * 90 + 'q.png',
         'z' * 160 + '/' + 'z' * 90 + '.png', 'w' * 300 + '.txt', 'k l=m\n.png', 'n.png/']


def add(tar, name, size=0, **fields):
  info = tarfile.TarInfo(name)
  info.size = size
  for field, value in fields.items():
    setattr(info, field, value)
  tar.addfile(info, io.BytesIO(bytes([len(name) % 251]) * size))


def archive(form, **more):
  """Names of every kind, as regular files, then what is none."""
  file, link = io.BytesIO(), 'a.png' * (1 if form == tarfile.USTAR_FORMAT else 30)
  with tarfile.open(fileobj=file, mode='w', format=form, **more) as tar:
    for i, name in enumerate(NAMES):
      with contextlib.suppress(ValueError):  # Too long a name, or large a number, for the form.
        add(tar, name, [0, 1, 511, 512, 513][i % 5], mtime=[7, 1.5][i % 2] if form else 7,
            uid=2**30 if i == 5 else i, uname=['', 'ö'][i % 2])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                 tarfile.CONTTYPE, tarfile.CHRTYPE, b'Z'):
      add(tar, f'{kind.decode()}.png', type=kind, linkname=link)
    add(tar, 'own.png', 3, pax_headers={'comment': 'no'})
    add(tar, 'last.png', 3, mode=0o100644)
  return file.getvalue()


ARCHIVES = {
  'ustar': archive(tarfile.USTAR_FORMAT), 'gnu': archive(tarfile.GNU_FORMAT),
  'pax': archive(tarfile.PAX_FORMAT), 'latin': archive(tarfile.GNU_FORMAT, encoding='latin1'),
  'global': archive(tarfile.PAX_FORMAT, pax_headers={'path': 'all.png'}),
}


def read(path, data):
  """Members, and what is left out, or the error."""
  path.write_bytes(data)
  left = Left()
  try:
    return [member[1:] for member in tars.members(str(path), left, SUFFIXES)], left.found
  except UserError as error:
    return str(error)


def by_tarfile_alone(path, data):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tars, 'regular_file', lambda *_: None)
    return read(path, data)


@pytest.mark.parametrize('form', ARCHIVES)
def test_odd_archives_are_read_as_by_tarfile(tmp_path, form):
  data, path = ARCHIVES[form], tmp_path / 'a.tar'
  found = read(path, data)
  assert found == by_tarfile_alone(path, data)
  with tarfile.open(path) as tar:
    files = {(tars.printable(i.name), i.offset_data, i.size, '') for i in tar if i.isfile()}
  members, left = found
  assert {*members} <= files
  assert len(members) >= 10 or form == 'global'
  assert left['links in tar files'][0] == 2 or form == 'global'
  for cut in range(0, len(data), 384):  # Headers, names and contents that end too early.
    assert read(path, data[:cut]) == by_tarfile_alone(path, data[:cut])


@pytest.mark.parametrize('form', ['gnu', 'pax', 'ustar'])
def test_damaged_headers_are_what_they_are_for_tarfile(tmp_path, form):
  """Flipped bytes of headers, with checksums that are wrong, and with such as are made right."""
  rng, path = np.random.default_rng(0), tmp_path / 'a.tar'
  whole = np.frombuffer(ARCHIVES[form], np.uint8)
  headers = [i for i in range(512, len(whole) - 1024, 512) if whole[i + 257 : i + 262].tobytes()
             == b'ustar']
  marks = np.frombuffer(b'\0 /059LxgS\xff\x80-.', np.uint8)
  for right in itertools.chain([False] * 60, [True] * 200):
    data, start = whole.copy(), int(rng.choice(headers))
    place = start + int(rng.choice([0, 60, 99, 100, 108, 124, 130, 135, 136, 156, 157, 257, 329,
                                    345, 499, 513, 520]))
    data[place] = rng.choice(marks)
    if right:
      header = data[start : start + 512]
      header[148:156] = 32
      header[148:156] = np.frombuffer(b'%06o\0 ' % int(header.sum(dtype=int)), np.uint8)
    found, expected = (each(path, data.tobytes()) for each in (read, by_tarfile_alone))
    assert found == expected, (place, right)


@pytest.mark.parametrize('form', ['ustar', 'gnu', 'pax'])
def test_what_every_writer_makes_needs_no_tarfile(tmp_path, form):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w', format=getattr(tarfile, f'{form.upper()}_FORMAT')) as t:
    for i in range(200):
      folder = 'x' * 60 * (i % 3)  # Of 120 letters in a field of its own, or in a header.
      name = f'{folder}/{i:03d}.png' if folder else f'{i:03d}.png'
      add(t, name, 100, mtime=1.5 if form == 'pax' else 1)
  path, asked = tmp_path / 'a.tar', []
  path.write_bytes(file.getvalue())
  with pytest.MonkeyPatch.context() as patch:
    real = tarfile.TarFile.next
    patch.setattr(tarfile.TarFile, 'next', lambda tar: asked.append(1) or real(tar))
    assert len([*tars.members(str(path), Left(), SUFFIXES)]) == 200
  assert len(asked) <= 3 and tar_headers.BLOCK == 512
