"""Files of PyTorch that would take more room or time than they have bytes: each is one sentence."""

import shutil
import struct
import time
import zipfile

import numpy as np
import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.formats.convert import convert
from diffusion_jax.formats.torch_files import read_script, read_state

torch = pytest.importorskip('torch')


@pytest.fixture
def saved(tmp_path):
  """saved(script, **tensors): a file with these tensors, as TorchScript or as a saved state."""

  def save(script, **tensors):
    path = tmp_path / 'x.pt'
    if not script:
      torch.save(tensors, path)
      return path
    module = torch.nn.Module()
    for name, tensor in tensors.items():
      module.register_buffer(name, tensor)
    torch.jit.script(module).save(str(path))
    return path

  return save


BOTH = pytest.mark.parametrize('script', [True, False], ids=['script', 'state'])


@BOTH
def test_tied_and_turned_tensors_are_read(script, saved):
  one = torch.arange(6.0).reshape(2, 3)
  found = read_state(saved(script, a=one, b=one, turned=one.T, short=one.bfloat16()))
  for name, value in {'a': one, 'b': one, 'turned': one.T, 'short': one}.items():
    np.testing.assert_array_equal(np.asarray(found[name], np.float32), value)


@BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.int64])
def test_strides_that_inflate_a_storage(script, dtype, saved, tmp_path):
  path = saved(script, x=torch.ones(2, dtype=dtype)[:1].expand(10**12))
  assert path.stat().st_size < 10_000
  with pytest.raises(UserError, match=r'of shape \[1000000000000\] is larger than its storage'):
    read_state(path)
  with pytest.raises(UserError, match='larger than its storage'):
    convert(path, tmp_path / 'y.safetensors', 'tensors')
  assert not (tmp_path / 'y.safetensors').exists()


@BOTH
def test_many_tensors_of_one_storage(script, saved):
  one = torch.ones(100_000)
  path = saved(script, **{f't{n}': one for n in range(50)})
  with pytest.raises(UserError, match=r'but its tensors 20,000,000; save each of them once'):
    read_state(path)


def rewritten(path, change=lambda name, data: data, how=zipfile.ZIP_STORED, left=()):
  """The archive written anew."""
  old = shutil.copyfile(path, path.with_suffix('.old'))
  with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, 'w', how) as new:
    for name in source.namelist():
      if not name.endswith(left or '\n'):
        new.writestr(name, change(name, source.read(name)))
  return path


@BOTH
def test_compressed_storages(script, saved):
  path = rewritten(saved(script, x=torch.zeros(10**7)), how=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 100_000
  with pytest.raises(UserError, match=r'x\.pt is not a whole archive of PyTorch .*is compressed'):
    read_state(path)


@BOTH
def test_entries_that_lie_over_each_other(script, saved):
  path = saved(script, x=torch.zeros(10**5))
  with zipfile.ZipFile(path, 'a') as archive:
    [entry] = [e for e in archive.infolist() if e.file_size == 400_000]
    for number in range(100):
      clone = zipfile.ZipInfo(f'{entry.filename}{number}')
      for name in ('file_size', 'compress_size', 'CRC', 'header_offset'):
        setattr(clone, name, getattr(entry, name))
      archive.filelist.append(clone)
    archive._didModify = True
  with pytest.raises(UserError, match=r'its entries have 40,\d+,\d+ bytes, the file'):
    read_state(path)


@BOTH
def test_sizes_that_the_file_does_not_have(script, saved):
  path = saved(script, x=torch.zeros(4321))
  said, much = struct.pack('<II', 4 * 4321, 4 * 4321), struct.pack('<II', 2**31, 2**31)
  data = path.read_bytes()
  assert said in data
  path.write_bytes(data.replace(said, much))
  with pytest.raises(UserError, match=r'x\.pt is not a whole archive of PyTorch'):
    read_state(path)


@BOTH
@pytest.mark.parametrize('end', ['data/0', 'data.pkl'])
def test_entries_that_are_missing_or_there_twice(script, end, saved):
  path = rewritten(saved(script, x=torch.zeros(4)), left=(end,))
  with pytest.raises(UserError, match=r'x\.pt'):
    read_state(path)
  path = saved(script, x=torch.zeros(4))
  with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning, match='Duplicate'):
    archive.writestr(next(n for n in archive.namelist() if n.endswith(end)), b'')
  with pytest.raises(UserError, match='two entries have one name'):
    read_state(path)


def test_what_only_begins_like_an_archive(tmp_path):
  (tmp_path / 'x.pt').write_bytes(b'PK\3\4' + bytes(100))
  with pytest.raises(UserError, match='not a whole archive of PyTorch'):
    read_state(tmp_path / 'x.pt')


@pytest.mark.parametrize('tensor', [
  lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3, device='meta'),
  lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
], ids=['sparse', 'meta', 'quantised'])
def test_what_is_no_plain_array(tensor, saved):
  with pytest.raises(UserError, match=r'x is no plain array'):
    read_state(saved(False, x=tensor()))


MODULE = b'c__torch__\nM\n)\x81'


def shared_modules(levels):
  """Modules whose two attributes are one and the same module below: 2^levels names."""
  name = lambda letter: b'X\1\0\0\0' + letter
  data = b'\x80\2' + MODULE + b'}bq\0'
  for level in range(1, levels):
    below, this = b'h' + bytes([level - 1]), b'q' + bytes([level])
    data += b'0' + MODULE + b'}(' + name(b'a') + below + name(b'b') + below + b'ub' + this
  return data + b'.'


@pytest.mark.parametrize(('table', 'words'), [
  (shared_modules(60), 'modules within one another without end'),
  (b'\x80\2' + MODULE + b'q\0}(X\1\0\0\0ah\0ub.', 'modules within one another without end'),
  (b'\x80\2}r' + struct.pack('<I', 2**31) + b'.', 'keeps 2,147,483,648 values'),
  (b'\x80\5\x96' + struct.pack('<Q', 2**40) + b'.', 'not a whole TorchScript archive'),
  (b'\x80\2' + b'(l' * 200_000 + b'.', 'not a whole TorchScript archive'),
  (b'\x80\2K\1.', 'not a whole TorchScript archive'), (b'', 'not a whole TorchScript archive'),
  (b'\x80\2' + bytes(2**24), 'a table of'),
], ids=['shared', 'cycle', 'memo', 'bytearray', 'deep', 'number', 'nothing', 'long'])
def test_tables_that_would_keep_the_reader_busy(table, words, saved):
  path = saved(True, x=torch.zeros(4))
  rewritten(path, lambda name, data: table if name.endswith('/data.pkl') else data)
  start = time.process_time()
  with pytest.raises(UserError, match=words):
    read_script(path)
  assert time.process_time() - start < 5
