"""One transformer from and to a file of its publishers, in their names.

Of DiT and PixArt such a file has a table of fixed positions, too, which tells the side of the
training pictures and what positions were divided by.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.formats.networks import Part
from diffusion_jax.formats.pipeline import typed
from diffusion_jax.formats.published import some
from diffusion_jax.formats.single_file import KEYS, part_of, rules_for, untold
from diffusion_jax.formats.single_file_names import UNET, from_stored, to_stored
from diffusion_jax.formats.tensors import PICKLES, Tensor, open_tensors, write_tensors
from diffusion_jax.formats.torch_files import load_plain, tensors_of
from diffusion_jax.formats.transformer_names import STARTS, TRANSFORMER_CONFIGS
from diffusion_jax.models.dit import grid_positions, sincos_positions

_POSITIONS = 'pos_embed'
_OF_PATCHES = ('pixart', 'dit')
_UNUSED = ('y_embedder.y_embedding',)
"""The text of no text in PixArt's training, which no pipeline reads: it encodes the empty one."""
_STATES = ('ema', 'state_dict_ema', 'state_dict', 'model')
"""Where a file of training has its network, best first."""


def read_original(path: Path, kind: str) -> tuple[Part, list[str]]:
  """One transformer in a file of its own or of a whole model, and sentences on the rest.

  UserError: a broken file, missing tensors, or positions that its network does not have.

  Args:
    path: a .safetensors file, or one that PyTorch reads as plain data.
    kind: of TABLES.
  """
  inner = {name.removeprefix(UNET): t for name, t in _opened(path).items()}
  own = {n: t for n, t in inner.items() if n.partition('.')[0] in STARTS[kind]}
  shapes = {n: tuple(t.shape) for n, t in own.items()}
  notes, patches = [], kind in _OF_PATCHES
  if patches:
    unused = [name for name in _UNUSED if own.pop(name, None) is not None]
    unused += sorted(inner.keys() - own.keys() - {_POSITIONS, *unused})
    if unused:
      notes.append(f'{path}: left out is what no pipeline reads: {some(unused)}.')
    if _POSITIONS in inner:
      shapes[_POSITIONS] = tuple(inner[_POSITIONS].shape)
  try:
    values = TRANSFORMER_CONFIGS[kind](shapes, str(path))
  except (IndexError, ValueError) as error:
    raise UserError(f'{path} holds tensors with too few axes; fetch it again.') from error
  if patches:
    notes += _read_positions(kind, values, inner.get(_POSITIONS), str(path))
  part = part_of(values)
  part.stored = from_stored(rules_for(kind, part, kind), own, str(path))
  part.check(str(path))
  return part, notes


def _opened(path: Path) -> Mapping[str, Tensor]:
  if path.suffix not in PICKLES:
    return open_tensors(path)
  values = load_plain(path)
  inner = next((values[name] for name in _STATES if isinstance(values.get(name), dict)), values)
  named = all(isinstance(name, str) for name in inner)
  require(named, f'{path} holds no tensors by name.')
  found = tensors_of(inner, path)
  return {name: Tensor(t.dtype, t.shape, lambda t=t: t) for name, t in found.items()}


def write_original(part: Part, path: Path, dtype: str | None) -> list[str]:
  """Write one transformer as its publishers' file of it alone, without a prefix.

  Returns sentences on what those who read the file will take to be otherwise than it is.
  """
  require(not path.exists(), f'{path} is there already; give a new path.')
  stored = to_stored(rules_for(part.kind, part, part.kind), part.tensors, str(path))
  shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
  notes = []
  if part.kind in _OF_PATCHES:
    table = _positions(part)
    stored[_POSITIONS] = Tensor(table.dtype, table.shape, lambda: table)
    shapes[_POSITIONS] = table.shape
    values = TRANSFORMER_CONFIGS[part.kind](shapes, str(path))
    values['_class_name'] = part.values['_class_name']
    notes = untold(part.kind, part, values, KEYS[part.kind])
  write_tensors(path, typed(stored, dtype))
  return notes


def _sinusoids(side: int, features: int, scale: float) -> np.ndarray:
  places = grid_positions(side, side) / scale
  return np.asarray(sincos_positions(places, places, features)).reshape(1, side**2, features)


def _positions(part: Part) -> np.ndarray:
  """The table of positions [1 n c] of the training pictures."""
  config = part.config
  require(
    config.positions == 'sincos',
    f'a single file has no name for {config.positions} positions; convert to another layout.',
  )
  scale = getattr(config, 'scale', 1.0)
  return _sinusoids(config.sample_size // config.patch_size, config.features, scale)


def _read_positions(
  kind: str, values: dict[str, Any], table: Tensor | None, where: str
) -> list[str]:
  """Write into `values` what a table of positions tells; sentences on what it does not.

  UserError: DiT's is not the one that its network computes.
  """
  scale = None if table is None else _scale(np.asarray(table.make(), np.float32)[0])
  if kind == 'dit':
    require(
      table is None or table.shape[1] == 1 or scale == 1,
      f'{where}: {_POSITIONS} is not the table of sinusoids that a DiT has; fetch it again.',
    )
  elif scale is not None:
    values['interpolation_scale'] = scale
  notes = []
  if table is None:
    notes.append(
      f'{where} has no {_POSITIONS}, which tells the size of the training pictures; sample_size is '
      f'taken to be {values["sample_size"]}: correct it in config.json where it is another.'
    )
  if kind == 'pixart' and scale is None:
    taken = max(values['sample_size'] // 64, 1)
    notes.append(
      f'{where} does not tell what its positions are divided by; interpolation_scale is taken to '
      f'be {taken}: correct it in config.json where it is another.'
    )
    values['interpolation_scale'] = taken
  return notes


def _scale(table: np.ndarray) -> float | None:
  """What positions are divided by in a table [n c]; None where it has no sinusoids of them."""
  (places, features), quarter = table.shape, table.shape[1] // 4
  side = math.isqrt(places)
  if side < 2 or features % 4 or not features:
    return None
  slowest = 10_000.0 ** -((quarter - 1) / quarter)
  last = float(table[side - 1, quarter - 1])  # Its sine of the last column.
  if not 0 < last <= 1:
    return None
  scale = round(slowest * (side - 1) / math.asin(last), 2)
  if not 0.01 <= scale <= 100:
    return None
  rounding = 0.02  # Of half precision and of the scale.
  return scale if np.abs(table - _sinusoids(side, features, scale)[0]).max() < rounding else None
