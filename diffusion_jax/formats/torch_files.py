"""Files of PyTorch, read as data: nothing in them is ever run.

Those of `torch.save` are read by PyTorch with weights_only, which refuses all but plain data. Of
TorchScript archives, with code and tensors, the table of attributes is read by an unpickler of five
names, and the tensors that it points to.
"""

import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.files import reading

_STORAGES = {
  'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
  'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}


MOST_TABLE = 2**24
"""Bytes of a table of attributes; the FID Inception's has 145 thousand."""
MOST_MODULES = 100_000
MOST_COPIES = 4
"""Bytes of all tensors together to those of their file; more only where they share storages."""


def load_plain(path: str | os.PathLike) -> dict[str, Any]:
  """The dictionary that `torch.save` wrote: tensors, texts, numbers, never code.

  UserError: no such file, no PyTorch, anything but plain data, or no dictionary.
  """
  path = Path(path)
  require(path.is_file(), f'There is no file {path}; check the path.')
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path} can only be read where PyTorch is installed; install it, or convert the file to '
      'safetensors.'
    ) from error
  if _is_archive(path):
    _open_archive(path).close()
  with reading(path, 'cannot be read without running code from it', 'convert it to safetensors'):
    values = torch.load(path, map_location='cpu', weights_only=True)
  named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
  require(named, f'{path} holds no tensors by name.')
  return values


def tensors_of(values: dict[str, Any], path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors among a file's `values`; floating types become float32; UserError if not plain."""
  import torch

  found = {name: t.detach() for name, t in values.items() if isinstance(t, torch.Tensor)}
  for name, tensor in found.items():
    require(
      tensor.layout == torch.strided and tensor.device.type == 'cpu' and not tensor.is_quantized,
      f'{path}: {name[:200]} is no plain array; save it as one.',
    )
    require(
      tensor.nbytes <= tensor.untyped_storage().nbytes(),
      f'{path}: {name[:200]} of shape {list(tensor.shape)[:9]} is larger than its storage.',
    )
  _check_sum((tensor.nbytes for tensor in found.values()), Path(path))
  with reading(path):
    return {
      name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
      for name, tensor in found.items()
    }


def read_state(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Return the tensors of a module by name, from its saved state or a TorchScript archive."""
  return read_script(path) if is_script(path) else tensors_of(load_plain(path), path)


def is_script(path: str | os.PathLike) -> bool:
  """Return whether a file is a TorchScript archive, which alone has a table of constants."""
  path = Path(path)
  if not path.is_file() or not _is_archive(path):
    return False
  with _open_archive(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def read_script(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """A TorchScript archive's values by dotted name; none of its code is run.

  UserError: damage, other objects than modules, tensors and plain values, or tensors larger than
  their storage.
  """
  path = Path(path)
  with reading(path, 'is not a whole TorchScript archive'), _open_archive(path) as archive:
    [table] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    folder = table.removesuffix('data.pkl')
    data = archive.read(table)
    _check_table(data)
    load = functools.cache(lambda key: archive.read(f'{folder}data/{key}'))
    try:
      found = dict(_tensors(_Unpickler(io.BytesIO(data), load).load()))
    except UserError as error:
      raise UserError(f'{path} {error}') from error
  _check_sum((tensor.nbytes for tensor in found.values()), path)
  return found


def _is_archive(path: Path) -> bool:
  with path.open('rb') as file:
    return file.read(4) == b'PK\3\4' or zipfile.is_zipfile(path)


def _open_archive(path: Path) -> zipfile.ZipFile:
  """An archive of PyTorch, its data uncompressed, so that it cannot unpack to more than it is."""
  with reading(path, 'is not a whole archive of PyTorch'):
    archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
      raise ValueError('two entries have one name')
    data = [e for e in entries if '/code/' not in e.filename and e.filename[-10:] != '.debug_pkl']
    packed = [entry.filename for entry in data if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
      raise ValueError(f'{packed[0][:100]} is compressed')
    total, size = sum(entry.file_size for entry in data), path.stat().st_size
    if total > size:
      raise ValueError(f'its entries have {total:,} bytes, the file {size:,}')
  return archive


def _check_sum(sizes: Iterable[int], path: Path) -> None:
  total, size = sum(sizes), path.stat().st_size
  require(
    total <= MOST_COPIES * size,
    f'{path} has {size:,} bytes, but its tensors {total:,}; save each of them once.',
  )


def _check_table(data: bytes) -> None:
  """Raise ValueError for a pickle that would make its reader take far more memory than bytes."""
  if len(data) > MOST_TABLE:
    raise ValueError(f'a table of {len(data):,} bytes')
  for code, argument, _ in pickletools.genops(data):
    if code.name.endswith('PUT') and int(argument) > len(data):  # Room is made for all before it.
      raise ValueError(f'a table that keeps {int(argument):,} values')


class _Module:
  """A module of an archive: its attributes, and none of its methods."""

  attributes: dict[str, Any]

  def __setstate__(self, attributes: dict[str, Any]) -> None:
    self.attributes = attributes


class _Unpickler(pickle.Unpickler):
  """Builds modules, tensors and plain values; any other name in the table is an error."""

  def __init__(self, file, read):
    super().__init__(file)
    self.read = read

  def find_class(self, module: str, name: str) -> Any:
    if module.startswith('__torch__'):
      return _Module
    if module == 'torch' and name in _STORAGES:
      return _STORAGES[name]
    if module == 'torch.jit._pickle' and name.startswith('build_') and name.endswith('list'):
      return list
    known = {
      ('torch._utils', '_rebuild_tensor_v2'): self.rebuild, ('collections', 'OrderedDict'): dict,
    }
    require(
      (module, name) in known,
      f'holds {module}.{name}, which is no tensor; save the state of the module as safetensors.',
    )
    return known[module, name]

  def persistent_load(self, saved: tuple) -> np.ndarray:
    kind, dtype, key, _, size = saved
    if kind != 'storage' or not any(dtype is known for known in _STORAGES.values()):
      raise ValueError(f'a storage of no known type under {key}')
    array = np.frombuffer(self.read(key), dtype)
    if array.size != size:
      raise ValueError(f'storage {key} has {array.size} numbers, not {size}')
    return array

  def rebuild(
    self, storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any
  ) -> np.ndarray:
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if min((offset, *shape, *strides)) < 0 or (count and last >= storage.size):
      raise ValueError(f'a tensor of shape {list(shape)[:9]} leaves its storage')
    if count > storage.size:
      raise ValueError(f'a tensor of shape {list(shape)[:9]} is larger than its storage')
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _tensors(root: _Module) -> Iterator[tuple[str, np.ndarray]]:
  """(dotted name, tensor) of everything below a module, bounded for modules in several places."""
  stack, count = [('', root)], 0
  while stack:
    prefix, module = stack.pop()
    count += 1
    if count > MOST_MODULES or len(prefix) > 10_000:
      raise ValueError('modules within one another without end')
    for name, value in module.attributes.items():
      if isinstance(value, _Module):
        stack.append((f'{prefix}{name}.', value))
      elif isinstance(value, np.ndarray):
        yield f'{prefix}{name}', value
