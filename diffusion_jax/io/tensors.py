"""Safetensors files as tables of tensors that stay on the disk until they are read.

The library checks a file's header: its length, that offsets neither overlap nor leave the file,
that sizes fit shapes. After that each tensor is memory-mapped by itself, so that no more of a file
is in memory than the tensor at hand, and a slice of it reads only its own part.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from diffusion_jax.errors import UserError
from diffusion_jax.io.whole import replacing
from diffusion_jax.models.checks import require

DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64,
  'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
  'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX = '.index.json'
PICKLES = ('.bin', '.ckpt', '.pt', '.pth', '.pkl')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file."""

  path: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """A map of the tensor, or a copy of another type; the map ends with the array."""
    if not self.nbytes:
      array = np.zeros(self.shape, self.dtype)
    else:
      array = np.memmap(self.path, self.dtype, 'r', self.offset, self.shape).view(np.ndarray)
    return array if dtype is None else array.astype(dtype)


class NewTensor(NamedTuple):
  """A tensor to be written: what it is, and a function that makes it when its turn comes."""

  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
  """The tensors of a safetensors file, or of all files that a *.safetensors.index.json names.

  Raises:
    UserError: no such file, a pickle, or a file that is not whole and well-formed.
  """
  path = Path(path)
  if path.name.endswith(INDEX):
    return _open_shards(path)
  require(
    path.suffix not in PICKLES,
    f'{path} is a pickle, which can run any code and is never opened; convert it to safetensors.',
  )
  require(path.is_file(), f'There is no file {path}; check the path.')
  try:
    with safe_open(path, 'numpy'):
      pass  # Opening checks the whole header against the file's size.
    with open(path, 'rb') as file:
      length = struct.unpack('<Q', file.read(8))[0]
      header = json.loads(file.read(length))
  except (SafetensorError, OSError, ValueError, struct.error) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}); fetch or write it again.'
    ) from error
  header.pop('__metadata__', None)
  for name, entry in header.items():
    require(
      entry['dtype'] in DTYPES,
      f'{path}: {name} is of type {entry["dtype"]}; only {", ".join(DTYPES)} can be read.',
    )
  return {
    name: Tensor(path, np.dtype(DTYPES[entry['dtype']]), tuple(entry['shape']),
                 8 + length + entry['data_offsets'][0])
    for name, entry in header.items()
  }


def metadata(path: str | os.PathLike) -> dict[str, str]:
  """The texts that a safetensors file carries beside its tensors; the file has been opened."""
  with safe_open(path, 'numpy') as file:
    return file.metadata() or {}


def _open_shards(path: Path) -> dict[str, Tensor]:
  table = read_json(path).get('weight_map')
  names = isinstance(table, dict) and all(
    isinstance(name, str) and Path(name).name == name for name in table.values()
  )
  require(
    names, f'{path} must have a weight_map from tensors to files beside it; fetch it again.'
  )
  files = {name: open_tensors(path.parent / name) for name in sorted(set(table.values()))}
  for tensor, name in table.items():
    require(
      tensor in files[name],
      f'{path} says that {name} holds {tensor}, but it does not; fetch both again.',
    )
  return {tensor: files[name][tensor] for tensor, name in table.items()}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All tensors of a file, in memory."""
  return {name: np.array(tensor) for name, tensor in open_tensors(path).items()}


def write_tensors(
  path: str | os.PathLike, tensors: Mapping[str, NewTensor | np.ndarray],
  texts: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, one tensor at a time; it appears whole or not at all.

  The widest types come first, as the format wants its tensors aligned.
  """
  new = {
    name: t if isinstance(t, NewTensor) else NewTensor(t.dtype, t.shape, lambda t=t: t)
    for name, t in tensors.items()
  }
  order = sorted(new, key=lambda name: (-new[name].dtype.itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt', **(texts or {})}}
  end = 0
  for name in order:
    start, tensor = end, new[name]
    end += tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
    header[name] = {
      'dtype': _NAMES[np.dtype(tensor.dtype)], 'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  chunks = (_bytes(name, new[name]) for name in order)
  with replacing(Path(path), flushed=True) as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for chunk in chunks:
      file.write(memoryview(chunk))


def _bytes(name: str, tensor: NewTensor) -> np.ndarray:
  array = np.ascontiguousarray(tensor.make())
  if array.dtype != tensor.dtype or array.size != np.prod(tensor.shape, dtype=np.int64):
    raise ValueError(f'{name} is {array.dtype} {array.shape}, not {tensor.dtype} {tensor.shape}.')
  return array.reshape(-1).view(np.uint8)


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object. UserError where there is none."""
  require(path.is_file(), f'There is no file {path}; give the directory of a saved model.')
  try:
    values = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise UserError(f'{path} is not readable JSON ({error}); write it again.') from error
  require(isinstance(values, dict), f'{path} must hold a JSON object.')
  return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON object; the file appears whole or not at all."""
  text = json.dumps(values, indent=2, sort_keys=True) + '\n'
  with replacing(path, flushed=True) as file:
    file.write(text.encode())
