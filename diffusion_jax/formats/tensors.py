"""Safetensors files as tables of tensors that stay on the disk until they are read.

The library checks a file's header: its length, that offsets neither overlap nor leave the file,
that sizes fit shapes. After that each tensor is memory-mapped by itself, so that no more of a file
is in memory than the tensor at hand, and a slice of it reads only its own part.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
  """Return the tensors of a safetensors file, or of all that a *.safetensors.index.json names.

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
  return {
    name: Tensor(path, np.dtype(DTYPES[entry['dtype']]), tuple(entry['shape']),
                 start + entry['data_offsets'][0])
    for name, entry in header.items()
  }


def metadata(path: str | os.PathLike) -> dict[str, str]:
  """Return the texts in a safetensors file. UserError as `open_tensors`."""
  return _read_header(Path(path))[0].get('__metadata__') or {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
  """(the header, the place of the first tensor's bytes). UserError unless the file is whole."""
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
  path: str | os.PathLike, tensors: Mapping[str, NewTensor | np.ndarray],
  texts: Mapping[str, str] | None = None,
) -> None:
  """Write a safetensors file, one tensor at a time; it appears whole or not at all.

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
  with atomic_write(Path(path), flushed=True) as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for chunk in chunks:
      file.write(memoryview(chunk))


def _bytes(name: str, tensor: NewTensor) -> np.ndarray:
  array = np.ascontiguousarray(tensor.make())
  if array.dtype != tensor.dtype or array.size != np.prod(tensor.shape, dtype=np.int64):
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
  """Write a JSON object; the file appears whole or not at all."""
  text = json.dumps(values, indent=2, sort_keys=True) + '\n'
  with atomic_write(path, flushed=True) as file:
    file.write(text.encode())
