"""Files of PyTorch, read as data: nothing in them is ever run.

Those that `torch.save` wrote are read by PyTorch itself with weights_only, which refuses whatever
is not plain data. TorchScript archives hold code beside the tensors; of them the table of
attributes is read, by an unpickler that knows five names, and the tensors that it points to.
"""

import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.checks import require

_STORAGES = {
  'FloatStorage': np.float32, 'DoubleStorage': np.float64, 'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
  'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}


def load_plain(path: str | os.PathLike) -> dict[str, Any]:
  """The dictionary that `torch.save` wrote: PyTorch's tensors, texts, numbers, never code.

  Raises:
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
  try:
    values = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # Many kinds; all mean that the file is not plain data.
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'{path} cannot be read without running code from it ({reason}); convert it to safetensors.'
    ) from error
  named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
  require(named, f'{path} holds no tensors by name.')
  return values


def tensors_of(values: dict[str, Any]) -> dict[str, np.ndarray]:
  """The tensors among `values`, float32 where they are of another floating type."""
  import torch

  to_array = lambda t: (t.detach().float() if t.is_floating_point() else t.detach()).numpy()
  return {name: to_array(t) for name, t in values.items() if isinstance(t, torch.Tensor)}


def read_state(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of a module by name, from its saved state or from a TorchScript archive."""
  return read_script(path) if is_script(path) else tensors_of(load_plain(path))


def is_script(path: str | os.PathLike) -> bool:
  """Whether a file is a TorchScript archive, which alone has a table of constants."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def read_script(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Parameters and buffers of a TorchScript archive by dotted name; none of its code is run.

  UserError where it is damaged, or holds other things than modules, tensors and plain values.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      [table] = [name for name in archive.namelist() if name.endswith('/data.pkl')]
      folder = table.removesuffix('data.pkl')
      with archive.open(table) as file:
        root = _Unpickler(file, lambda key: archive.read(f'{folder}data/{key}')).load()
      return dict(_tensors(root))
  except UserError as error:
    raise UserError(f'{path} {error}') from error
  except Exception as error:  # Whatever a damaged pickle or archive raises.
    raise UserError(
      f'{path} is not a whole TorchScript archive ({type(error).__name__}: {error}); fetch it '
      'again.'
    ) from error


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
    array = np.frombuffer(self.read(key), dtype)
    if kind != 'storage' or array.size != size:
      raise ValueError(f'storage {key} has {array.size} numbers, not {size}')
    return array

  def rebuild(
    self, storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any
  ) -> np.ndarray:
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= storage.size):
      raise ValueError(f'a tensor of shape {list(shape)} leaves its storage')
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()


def _tensors(module: Any, prefix: str = ''):
  """(dotted name, tensor) of everything below a module."""
  for name, value in module.attributes.items():
    if isinstance(value, _Module):
      yield from _tensors(value, f'{prefix}{name}.')
    elif isinstance(value, np.ndarray):
      yield f'{prefix}{name}', value
