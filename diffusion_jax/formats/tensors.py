"""Safetensors files as tables of tensors that stay on the disk until they are read.

The library checks the header: length, offsets without overlap and within the file, sizes. Each
tensor is memory-mapped by itself, so one tensor at a time is in memory, and a slice reads its own
part.
"""

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from diffusion_jax.errors import require
from diffusion_jax.files import atomic_write, inside, parse_json, read_object, reading

DTYPES = {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64,
  'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
  'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MOST_HEADER = 2**24
"""Bytes of a header: room for a hundred thousand tensors."""
INDEX = '.index.json'
PICKLES = ('.bin', '.ckpt', '.pt', '.pth', '.pkl')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file or of one to be written, which `make` reads or computes when asked for."""

  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return self.dtype.itemsize * math.prod(self.shape)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Map the tensor of a file, or make a copy of another type; the map ends with the array."""
    array = self.make()
    return array if dtype is None else array.astype(dtype)

  def then(
    self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None,
    dtype: np.dtype | None = None,
  ) -> 'Tensor':
    """Return this tensor after a change, which waits, too; the shape or type is the new one."""
    shape, dtype = self.shape if shape is None else shape, self.dtype if dtype is None else dtype
    return Tensor(dtype, shape, lambda: change(self.make()))


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
  if not math.prod(shape):
    return np.zeros(shape, dtype)
  return np.memmap(path, dtype, 'r', offset, shape).view(np.ndarray)


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
  """The tensors of a safetensors file, or of all that a *.safetensors.index.json names.

  UserError: no such file, a pickle, or a file that is cut or malformed.
  """
  path = Path(path)
  if path.name.endswith(INDEX):
    return _open_shards(path)
  require(
    path.suffix not in PICKLES,
    f'{path} is a pickle, which can run any code and is never opened; convert it to safetensors.',
  )
  header, start = _read_header(path)
  header.pop('__metadata__', None)
  for name, entry in header.items():
    require(
      entry['dtype'] in DTYPES,
      f'{path}: {name} is of type {entry["dtype"]}; only {", ".join(DTYPES)} can be read.',
    )
    require(
      math.prod(max(edge, 1) for edge in entry['shape']) < 2**60,
      f'{path}: {name} has the shape {entry["shape"]}, which no array can have.',
    )
  found = {}
  for name, entry in header.items():
    dtype, shape = np.dtype(DTYPES[entry['dtype']]), tuple(entry['shape'])
    offset = start + entry['data_offsets'][0]
    found[name] = Tensor(dtype, shape, functools.partial(_mapped, path, dtype, shape, offset))
  return found


def metadata(path: str | os.PathLike) -> dict[str, str]:
  """Return the texts in a safetensors file. UserError as `open_tensors`."""
  return _read_header(Path(path))[0].get('__metadata__') or {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
  """(the header, the place of the first tensor's bytes); UserError unless the file is complete."""
  require(path.is_file(), f'There is no file {path}; check the path.')
  with reading(path, 'is not a whole safetensors file'):
    with open(path, 'rb') as file:
      length = struct.unpack('<Q', file.read(8))[0]
      if length > MOST_HEADER:
        raise ValueError(f'its header has {length:,} bytes, where {MOST_HEADER:,} are allowed')
      text = file.read(length)
    header = parse_json(text)
    with safe_open(path, 'numpy'):
      pass  # Opening checks the whole header against the file's size.
  return header, 8 + length


def _open_shards(path: Path) -> dict[str, Tensor]:
  table = read_json(path).get('weight_map')
  names = isinstance(table, dict) and all(
    isinstance(name, str) and Path(name).name == name and name not in ('', '..')
    and not name.endswith(INDEX) and '\0' not in name
    and len(name.encode()) < 256 for name in table.values()
  )
  require(names, f'{path} must have a weight_map from tensors to files beside it; fetch it again.')
  folder = path.parent
  files = {n: open_tensors(inside(folder / n, folder)) for n in sorted(set(table.values()))}
  for tensor, name in table.items():
    require(
      tensor in files[name],
      f'{path} says that {name} holds {tensor}, but it does not; fetch both again.',
    )
  return {tensor: files[name][tensor] for tensor, name in table.items()}


def write_tensors(
  path: str | os.PathLike, tensors: Mapping[str, Tensor | np.ndarray],
  texts: Mapping[str, str] | None = None,
) -> None:
  """Write a safetensors file atomically, one tensor at a time, the widest types first (aligned)."""
  order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt', **(texts or {})}}
  end = 0
  for name in order:
    start, tensor = end, tensors[name]
    end += tensor.nbytes
    header[name] = {
      'dtype': _NAMES[np.dtype(tensor.dtype)], 'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with atomic_write(Path(path), flushed=True) as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name in order:
      file.write(memoryview(_bytes(name, tensors[name])))


def _bytes(name: str, tensor: Tensor | np.ndarray) -> np.ndarray:
  array = np.ascontiguousarray(tensor)
  if array.dtype != tensor.dtype or array.size != math.prod(tensor.shape):
    raise ValueError(f'{name} is {array.dtype} {array.shape}, not {tensor.dtype} {tensor.shape}.')
  return array.reshape(-1).view(np.uint8)


def is_finite(values: np.ndarray) -> bool:
  """Return whether all are finite floating numbers in float32."""
  with np.errstate(over='ignore'):
    return values.dtype.kind in 'fV' and bool(np.isfinite(values.astype(np.float32)).all())


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """Return a JSON object of a saved model. UserError where there is none."""
  require(Path(path).is_file(), f'There is no file {path}; give the directory of a saved model.')
  return read_object(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
  """Write a JSON object atomically."""
  text = json.dumps(values, indent=2, sort_keys=True) + '\n'
  with atomic_write(path, flushed=True) as file:
    file.write(text.encode())
