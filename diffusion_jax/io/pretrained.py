"""Reads and writes model directories in the layout of diffusers and transformers.

A directory holds config.json and one safetensors file; both libraries' `from_pretrained` open what
`save_model` writes, and `load_model` opens what they write. Nothing here unpickles or downloads.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UserError
from diffusion_jax.io.convert import from_published, to_published
from diffusion_jax.io.kinds import KINDS, TRANSFORMERS, Kind
from diffusion_jax.io.kinds import kind as find_kind
from diffusion_jax.models import functional
from diffusion_jax.models.checks import require
from diffusion_jax.models.lpips import lpips_shapes

ASSETS = Path(__file__).resolve().parents[1] / 'assets'
PREFIX = 'asset:'
DTYPES = ('float32', 'float16')


def resolve(path: str | os.PathLike) -> Path:
  """'asset:NAME' -> the file or directory NAME that the package ships; another path as it is.

  UserError, listing what exists, where there is no such asset.
  """
  text = os.fspath(path)
  if not text.startswith(PREFIX):
    return Path(text)
  name = text.removeprefix(PREFIX)
  found = (ASSETS / name).resolve()
  inside = found.is_relative_to(ASSETS) and found != ASSETS
  if not inside or not found.exists():
    entries = ASSETS.iterdir() if ASSETS.is_dir() else ()
    names = sorted(PREFIX + entry.name for entry in entries)
    raise UserError(f'There is no {text}; there is {", ".join(names) or "no asset at all"}.')
  return found


def save_model(
  directory: str | os.PathLike, config: Any, params: Mapping[str, Any], dtype: str = 'float32'
) -> None:
  """Writes a model; its kind follows from the config's type. `dtype`: 'float32' or 'float16'.

  The files appear whole or not at all. UserError where float16 cannot hold a weight.
  """
  require(dtype in DTYPES, f'dtype must be one of {", ".join(DTYPES)}, not {dtype!r}.')
  kind = _kind_of(config)
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {name: _cast(name, t, dtype) for name, t in to_published(params).items()}
  values = kind.write(config)
  if kind.weights == TRANSFORMERS:
    values['dtype'] = dtype
  text = json.dumps(values, indent=2, sort_keys=True) + '\n'
  _replace(directory / kind.weights, lambda p: save_file(tensors, p, metadata={'format': 'pt'}))
  _replace(directory / 'config.json', lambda p: p.write_text(text))


def load_model(kind: str, directory: str | os.PathLike) -> tuple[Any, dict[str, np.ndarray]]:
  """(config, parameters by dotted name in float32, on the host) of a model directory.

  `kind` is one of KINDS; `directory` may be 'asset:NAME'. UserError where something is missing,
  broken, of another kind, or not implemented.
  """
  spec, directory = find_kind(kind), resolve(directory)
  path = directory / 'config.json'
  values = _read_json(path)
  key, known = spec.named
  require(
    values.get(key) in known,
    f'{path} describes no {kind}: its {key} is {values.get(key)!r} and must be '
    f'{" or ".join(map(repr, known))}.',
  )
  config = spec.read(values, str(path))
  shapes = functional.abstract(lambda rngs: spec.module(config, rngs=rngs))[1]
  weights = _find_weights(directory, spec.weights)
  tensors = read_tensors(weights)
  if kind == 'clip_text':
    tensors = {n if n.startswith('text_model.') else f'text_model.{n}': t
               for n, t in tensors.items()}
  return config, from_published(tensors, shapes, str(weights))


def load_lpips(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Parameters for models.lpips from a safetensors file of the `lpips` package's state (VGG)."""
  path = resolve(path)
  unused = ('scaling_layer.', 'lins.')  # Constants, and a second name of lin0 to lin4.
  tensors = {n: t for n, t in read_tensors(path).items() if not n.startswith(unused)}
  return from_published(tensors, lpips_shapes(), str(path))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
  """All arrays of a safetensors file. UserError where it is missing or damaged."""
  require(path.is_file(), f'There is no file {path}; check the path.')
  try:
    return load_file(path)
  except (SafetensorError, OSError, KeyError, ValueError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}); fetch or write it again.'
    ) from error


def _kind_of(config: Any) -> Kind:
  for kind in KINDS.values():
    if kind.config is type(config):
      return kind
  raise UserError(f'No kind of model has a config of type {type(config).__name__}.')


def _find_weights(directory: Path, name: str) -> Path:
  """The weights' file, in full precision or, failing that, its published float16 variant."""
  variants = (directory / name, directory / name.replace('.safetensors', '.fp16.safetensors'))
  for path in variants:
    if path.is_file():
      return path
  pickles = sorted(p.name for p in directory.glob('*.bin'))
  why = f' ({pickles[0]} is a pickle, which is never opened)' if pickles else ''
  raise UserError(f'There is no {variants[0]}{why}; give a directory with safetensors weights.')


def _read_json(path: Path) -> dict[str, Any]:
  require(path.is_file(), f'There is no file {path}; give the directory of a saved model.')
  try:
    values = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise UserError(f'{path} is not readable JSON ({error}); write it again.') from error
  require(isinstance(values, dict), f'{path} must hold a JSON object.')
  return values


def _cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over='ignore'):
    cast = value.astype(dtype)
  require(
    bool(np.isfinite(cast).all()),
    f'{name} has values that {dtype} cannot hold; save as float32, or look for divergence.',
  )
  return cast


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
  """Writes beside `path`, flushes to the disk, then renames over it."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
  os.close(handle)
  try:
    write(Path(temporary))
    os.chmod(temporary, 0o644)
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    Path(temporary).unlink(missing_ok=True)
