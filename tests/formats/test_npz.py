"""Archives of arrays that promise more than they hold, or than there is memory for."""

import io
import resource
import struct
import zipfile

import numpy as np
import pytest

from diffusion_jax.data.image_sets import ImageBatch
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.statistics import load_statistics

MU, SIGMA = np.zeros(3), np.eye(3)


def npy(array=None, header=None, data=b'', version=(1, 0)):
  """The bytes of a .npy file, of an array or with any header."""
  if array is not None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()
  text = header.encode() + b'\n'
  size = struct.pack('<H' if version == (1, 0) else '<I', len(text))
  return b'\x93NUMPY' + bytes(version) + size + text + data


def archive(path, packed=zipfile.ZIP_STORED, **members):
  with zipfile.ZipFile(path, 'w', packed) as file:
    for name, data in members.items():
      file.writestr(f'{name}.npy', data)
  return path


def says(shape, dtype='<f8'):
  return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"


def zeros(header, size):
  return npy(header=header) + bytes(size)


MEMBERS = {
  'huge_shape': npy(header=says((10**9, 10**9))),
  'negative': npy(header=says((-1, 3)), data=bytes(24)),
  'bool_shape': npy(header=says((True, 3)), data=bytes(24)),
  'empty_and_huge': npy(header=says((0, 10**30))),
  'short': npy(header=says((3,)), data=bytes(16)),
  'long': npy(header=says((3,)), data=bytes(32)),
  'objects': npy(np.array([{}, print], object)),
  'records_of_objects': npy(np.zeros(1, [('a', 'O')])),
  'code': npy(header="{'descr': '<f8', 'fortran_order': False, 'shape': (print(1),)}"),
  'nested': npy(header='(' * 9000),
  'long_header': npy(header=' ' * 10**6 + says((3,)), data=bytes(24), version=(2, 0)),
  'version': npy(header=says((3,)), data=bytes(24), version=(3, 0)),
  'no_header': b'',
  'type': npy(header=says((3,), '<f999'), data=bytes(24)),
  'texts': npy(np.array(['a', 'b', 'c'])),
  'pickle': b'\x80\x04cos\nsystem\n(S"touch RAN"\ntR.',
}


@pytest.mark.parametrize('member', MEMBERS)
def test_members_that_are_not_what_they_say(tmp_path, member):
  data = MEMBERS[member]
  with pytest.raises(UserError, match=r'x\.npz'):
    load_statistics(archive(tmp_path / 'x.npz', mu=data, sigma=npy(SIGMA)))
  with pytest.raises(UserError, match=r'x\.npz'):
    load_statistics(archive(tmp_path / 'x.npz', mu=npy(MU), sigma=npy(SIGMA), n=data))
  with pytest.raises(UserError, match=r'x\.npz'):
    ImageBatch(archive(tmp_path / 'x.npz', arr_0=data))


def test_what_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path):
  path = tmp_path / 'bomb.npz'
  header = npy(header=says((2**16, 2**16)))
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    for name in ('sigma.npy', 'arr_0.npy'):
      with file.open(name, 'w', force_zip64=True) as out:
        out.write(header)
        for _ in range(3):  # 200 MB, which take 200 kB.
          out.write(bytes(2**26))
    file.writestr('mu.npy', npy(np.zeros(2**13)))
  # Its directory is made to claim the whole of what the header claims.
  data, size = path.read_bytes(), len(header) + 3 * 2**26
  assert path.stat().st_size < 2**20
  for claimed in (size, 2**32 - 2):
    path.write_bytes(data.replace(struct.pack('<I', size), struct.pack('<I', claimed)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (load_statistics, ImageBatch):
      with pytest.raises(UserError, match='claims to unpack to'):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_more_features_than_any_extractor_has(tmp_path):
  path = archive(tmp_path / 'x.npz', mu=npy(np.zeros(9000)), sigma=npy(np.zeros((2, 2))))
  with pytest.raises(UserError, match='do not fit'):
    load_statistics(path)
  torch = pytest.importorskip('torch')
  wide = torch.ones(1).expand(10**5)  # One number, seen a hundred thousand times.
  torch.save({'mu': wide, 'sigma': wide.expand(10**5, 10**5)}, tmp_path / 'x.pt')
  with pytest.raises(UserError, match='of 100,000 features'):
    load_statistics(tmp_path / 'x.pt')


def test_a_cache_that_is_packed_is_refused(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'mu': MU, 'sigma': SIGMA}, tmp_path / 'x.pt')
  with zipfile.ZipFile(tmp_path / 'x.pt') as file:
    members = {name: file.read(name) for name in file.namelist()}
  with zipfile.ZipFile(tmp_path / 'y.pt', 'w', zipfile.ZIP_DEFLATED) as file:
    for name, data in members.items():
      file.writestr(name, data)
  assert load_statistics(tmp_path / 'x.pt').mean.shape == (3,)
  with pytest.raises(UserError, match=r'y\.pt .*it is packed'):
    load_statistics(tmp_path / 'y.pt')


def test_a_list_of_members_that_fills_the_memory(tmp_path):
  path = archive(tmp_path / 'x.npz', mu=npy(MU), sigma=npy(SIGMA))
  data = bytearray(path.read_bytes())
  at = data.rfind(b'PK\5\6')
  data[at + 12 : at + 16] = struct.pack('<I', 2**31)
  path.write_bytes(data)
  with pytest.raises(UserError, match=r'list of members has 2,147,483,648 bytes'):
    load_statistics(path)


def test_sound_archives_are_read_in_either_order(tmp_path):
  mean, covariance = np.arange(3.0), np.asfortranarray(np.cov(np.random.default_rng(0).normal(
    size=(3, 9))))
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / 'x.npz', mu=mean, sigma=covariance, n=9, features='clip', other=[1])
    found = load_statistics(tmp_path / 'x.npz')
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-15)
    assert found.n == 9
