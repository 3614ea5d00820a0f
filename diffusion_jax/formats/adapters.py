"""Files of low-rank adapters (Hu et al. 2022), in all layouts that diffusers reads.

In memory a LoRA is {role: {layer: LoRAWeights}}; roles are 'unet' or 'transformer', 'text_encoder',
'text_encoder_2' and so on. Arrays keep the file's type. PEFT's LoraConfig is in the file's
metadata, one for each role (diffusers), or in adapter_config.json (PEFT).
"""

import collections
import dataclasses
import json
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError, require, shown
from diffusion_jax.files import inside, parse_json, reading
from diffusion_jax.formats.adapter_layers import (
  Joined,
  join,
  joined_layers,
  original_rows,
  split,
)
from diffusion_jax.formats.adapter_names import (
  KOHYA,
  ORIGINAL,
  TOWER,
  NamePatterns,
  Place,
  is_inversion,
  kohya_start,
  layers,
  of_other_kinds,
  places,
)
from diffusion_jax.formats.published import from_published_layout, some, to_published_layout
from diffusion_jax.formats.tensors import (
  PICKLES,
  is_finite,
  metadata,
  open_tensors,
  read_json,
  write_tensors,
)
from diffusion_jax.formats.torch_files import load_plain, tensors_of
from diffusion_jax.formats.transformer_names import Row
from diffusion_jax.models.lora import Rank
from diffusion_jax.models.unet import UNetConfig

METADATA = 'lora_adapter_metadata'
BESIDE = 'adapter_config.json'
MOST_SCALE = 1e4
"""Largest alpha / rank; trainers write 0.01 to 10."""

_NOT_IMPLEMENTED = (
  'use_dora', 'lora_bias', 'use_qalora', 'use_bdlora', 'arrow_config', 'kasa_config',
  'monteclora_config', 'alora_invocation_tokens', 'layer_replication',
)
# Others change the weights that the adapter is added to before it is trained, or may.
_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """One role's; alpha None: the rank; rank None: unknown. `where` names it in errors."""

  where: str
  alpha: float | None
  rank: int | None
  alphas: NamePatterns
  ranks: NamePatterns
  rank_stabilised: bool

  def alpha_of(self, names: Iterable[str], rank: int) -> float:
    """Return the alpha of a layer by its possible names; UserError for another rank."""
    names = tuple(names)
    said = self.ranks.find(names, self.rank)
    require(
      said is None or said == rank,
      f'{self.where} gives {names[0]} the rank {said}, but its matrices have {rank}; use the '
      'config that was written with them.',
    )
    alpha = self.alphas.find(names, rank if self.alpha is None else self.alpha)
    return float(alpha) * (math.sqrt(rank) if self.rank_stabilised else 1.0)


def check_alpha(alpha: float, rank: int, where: str) -> None:
  """Raise a UserError unless alpha / rank is a number that a LoRA may be scaled by."""
  require(
    math.isfinite(alpha) and abs(alpha) <= MOST_SCALE * rank,
    f'{where} is {alpha:g} for the rank {rank}; it must be a finite number of at most '
    f'{MOST_SCALE:g} times the rank.',
  )


def read_configs(path: Path, roles: Iterable[str], *, alone: bool) -> dict[str, AdapterConfig]:
  """The roles' configs from the file or, of PEFT's `alone`, from beside it; or UserError."""
  text = metadata(path).get(METADATA)
  if text is not None:
    where = f'{path}, {METADATA}'
    with reading(where, 'is not readable JSON', 'write it again'):
      values = parse_json(text)
    require(isinstance(values, dict), f'{where} must hold a JSON object.')
  elif alone and (path.parent / BESIDE).is_file():
    where = str(path.parent / BESIDE)
    values = read_json(inside(path.parent / BESIDE, path.parent))
  else:
    return {}
  found = {}
  for role in roles:
    start = f'{role}.'
    own = {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}
    own = own or {key: v for key, v in values.items() if '.' not in key}
    found[role] = _config(own, where)
  return found


def _config(values: Mapping[str, Any], where: str) -> AdapterConfig:
  kind, start = values.get('peft_type', 'LORA'), values.get('init_lora_weights', True)
  require(kind in ('LORA', None), f'{where}: peft_type={shown(kind)} is not implemented.')
  for key in _NOT_IMPLEMENTED:
    require(not values.get(key), f'{where}: {key} is not implemented.')
  require(
    any(start is known or (isinstance(known, str) and start == known) for known in _STARTS),
    f'{where}: init_lora_weights={shown(start)} changes the weights that the LoRA is added to; '
    "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion.",
  )
  return AdapterConfig(
    where, _number(values.get('lora_alpha'), f'{where}: lora_alpha'),
    _number(values.get('r'), f'{where}: r', whole=True),
    _patterns(values, 'alpha_pattern', where), _patterns(values, 'rank_pattern', where, whole=True),
    bool(values.get('use_rslora')),
  )


def _patterns(values: Mapping[str, Any], key: str, where: str, whole: bool = False) -> NamePatterns:
  table = values.get(key) or {}
  require(isinstance(table, dict), f'{where}: {key} must be a table by names of layers.')
  numbers_by_name = {
    name: _number(value, f'{where}: {key} of {name[:60]}', whole) for name, value in table.items()
  }
  missing = [name[:60] for name, value in numbers_by_name.items() if value is None]
  require(not missing, f'{where}: {key} has no number for {", ".join(missing[:3])}.')
  return NamePatterns(numbers_by_name, f'{where}: {key}')


def _number(value: Any, where: str, whole: bool = False) -> Any:
  if value is None:
    return None
  good = isinstance(value, int if whole else numbers.Real) and not isinstance(value, bool)
  require(
    good and (not whole or value > 0),
    f'{where} is {shown(value)}; it must be a {"positive whole " * whole}number.',
  )
  return value if whole else float(value)


LAYOUTS = ('kohya', 'peft')
_OF_PEFT = 'adapter_model'
_FILES = tuple(
  f'{stem}{end}' for end in ('.safetensors', '.bin') for stem in ('pytorch_lora_weights', _OF_PEFT)
)


class LoRAWeights(NamedTuple):
  """The adapter of one layer, which adds (alpha / r) a b to its kernel.

  a [i r] and b [r o] of a dense layer, a [k k i r] and b [1 1 r o] of a convolution.
  """

  a: np.ndarray
  b: np.ndarray
  alpha: float

  @property
  def size(self) -> Rank:
    return Rank(self.a.shape[-1], self.alpha)


LoRAs = dict[str, dict[str, LoRAWeights]]


def denoiser_role(config: Any) -> str:
  """Return the role of a denoiser with this config in files."""
  return 'unet' if isinstance(config, UNetConfig) else 'transformer'


def to_params(weights: Mapping[str, LoRAWeights]) -> tuple[dict[str, Rank], dict[str, np.ndarray]]:
  """Return the (sizes, parameters) of one network's adapters, for `models.lora.with_lora`."""
  params = {}
  for name, one in weights.items():
    params |= {f'{name}.lora.a': one.a, f'{name}.lora.b': one.b}
  return {name: one.size for name, one in weights.items()}, params


def from_params(params: Mapping[str, Any], sizes: Mapping[str, Rank]) -> dict[str, LoRAWeights]:
  """Return the inverse of `to_params`; other parameters may be among them."""
  part = lambda name, which: np.asarray(params[f'{name}.lora.{which}'])
  return {n: LoRAWeights(part(n, 'a'), part(n, 'b'), size.alpha) for n, size in sizes.items()}


def read_lora(
  path: str | os.PathLike, networks: Mapping[str, Mapping[str, Any]], *, inversions: bool = False
) -> LoRAs:
  """Read a LoRA of any layout that `write_lora`, kohya's scripts, diffusers or PEFT write.

  UserError: another kind of adapter; all that the networks lack or that is incomplete, empty, not
  finite or of wrong shapes, named at once.

  Args:
    path: a safetensors file, a .bin of PyTorch, of which only arrays are read, or the directory of
      diffusers or PEFT.
    networks: parameters (or their shapes) of the networks it is for, by role.
    inversions: whether the caller also reads textual inversions in the file, by
      `formats.textual_inversion.bundled_inversions`; otherwise they are refused.
  """
  require(bool(networks), 'read_lora needs the parameters of at least one network.')
  path = lora_file(Path(path))
  tensors = _tensors(path)
  learned = [name for name in tensors if is_inversion(name)]
  tensors = {name: tensor for name, tensor in tensors.items() if name not in set(learned)}
  require(
    not learned or (inversions and bool(tensors) and path.suffix not in PICKLES),
    f'{path} holds a textual inversion ({some(learned)})'
    + (' with its LoRA; --lora of sample and evaluate reads both, from safetensors.' if tensors
       else ', which is no LoRA; give it as --textual_inversion.'),
  )
  others = of_other_kinds(tensors)
  problems = [f'{kind}, which is not implemented: {some(of)}' for kind, of in others.items()]
  known = {role: layers(params) for role, params in networks.items()}
  joined = {role: joined_layers(of) for role, of in known.items()}
  found, unknown = places(tensors.keys() - set().union(*others.values()), known, path)
  configs = {} if path.suffix in PICKLES else read_configs(path, known, alone=path.stem == _OF_PEFT)
  if unknown:
    problems.append(f'no part of a LoRA of the given networks: {some(unknown)}')
  out: LoRAs = {}
  for (role, layer), names in found.items():
    parts = {part: tensors[name] for part, name in names.items()}
    try:
      several = joined[role].get(layer)
      kernel = known[role][layer] if several is None else several.kernel
      one = _layer(parts, names, kernel, (role, layer), configs.get(role))
      new = {layer: one} if several is None else split(one, several)
      twice = out.get(role, {}).keys() & new.keys()
      require(not twice, f'more than one adapter of {role} {some(twice)}: {some(names.values())}')
      out.setdefault(role, {}).update(new)
    except UserError as error:
      problems.append(str(error))
  more = f'; and {len(problems) - 6} more' * (len(problems) > 6)
  require(not problems, f'{path} does not fit: {"; ".join(problems[:6])}{more}.')
  require(bool(out), f'{path} holds no LoRA.')
  return out


def _tensors(path: Path) -> Mapping[str, Any]:
  if path.suffix not in PICKLES:
    return open_tensors(path)
  values = load_plain(path)
  tensors = tensors_of(values, path)
  require(
    len(tensors) == len(values),
    f'{path} holds {some(map(str, values.keys() - tensors.keys()))}, which is no tensor.',
  )
  return tensors


def _layer(
  parts: Mapping[str, Any], names: Mapping[str, str], kernel: tuple[int, ...], place: Place,
  config: AdapterConfig | None,
) -> LoRAWeights:
  """The adapter of a layer with that kernel; UserError, without the file's name, for a bad one."""
  where = ' '.join(place)
  require({'a', 'b'} <= parts.keys(), f'without its other matrix: {where}')
  a, b = (_reshape(parts[part], names[part], len(kernel)) for part in 'ab')
  rank, window, middle = a.shape[-1], kernel[:-2], parts.get('mid')
  require(rank > 0 and b.size > 0, f'of rank 0: {where}')
  if middle is not None:
    a = _composed(a, _reshape(middle, names['mid'], len(kernel)), names['mid'])
  ones = tuple(1 for _ in window)
  require(
    a.shape == (*kernel[:-1], rank) and b.shape == (*ones, rank, kernel[-1]),
    f'of a wrong shape: {where} ({list(parts["a"].shape)} and {list(parts["b"].shape)} for a '
    f'kernel {list(kernel)})',
  )
  if 'alpha' in parts:
    alpha, said = _scalar(parts['alpha'], names['alpha']), names['alpha']
  elif config is not None:
    alpha = config.alpha_of((place[1], place[1].removeprefix(TOWER)), rank)
    said = f'{config.where}: alpha of {where}'
  else:
    alpha, said = float(rank), where
  check_alpha(alpha, rank, said)
  return LoRAWeights(a, b, alpha)


def _reshape(tensor: Any, name: str, dims: int) -> np.ndarray:
  """A published matrix in our layout; a window of 1x1 may be stored or not, whatever the layer."""
  value = np.array(tensor)
  require(value.dtype.kind in 'fV', f'{name} is of type {value.dtype}, not of floating numbers')
  require(is_finite(value), f'{name} has values that are not finite')
  if dims == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
    value = value[..., 0, 0]
  elif dims == 4 and value.ndim == 2:
    value = value[..., None, None]
  return np.ascontiguousarray(from_published_layout('kernel.kernel', value))


def _composed(a: np.ndarray, middle: np.ndarray, name: str) -> np.ndarray:
  """LyCORIS' third matrix of a convolution, [k k r r], after the first, [1 1 i r]: [k k i r]."""
  rank = a.shape[-1]
  require(
    a.ndim == 4 and a.shape[:2] == (1, 1) and middle.shape[2:] == (rank, rank),
    f'{name} of shape {list(middle.shape)} stands between no two matrices of a convolution',
  )
  return a[0, 0].astype(np.float32) @ middle.astype(np.float32)


def _scalar(tensor: Any, name: str) -> float:
  value = np.asarray(tensor)
  good = value.size == 1 and value.dtype.kind in 'fVi'
  require(good, f'{name} of shape {list(value.shape)} and type {value.dtype} is no number')
  return float(value.reshape(()))


def lora_file(path: Path) -> Path:
  """Return the file of a LoRA, given itself or by its directory. UserError for none."""
  if not path.is_dir():
    return path
  found = next((inside(path / n, path) for n in _FILES if (path / n).is_file()), None)
  if found is None:
    raise UserError(f'{path} holds neither {" nor ".join(_FILES)}; give the file of a LoRA.')
  return found


def write_lora(
  path: str | os.PathLike, lora: Mapping[str, Mapping[str, LoRAWeights]], layout: str = 'kohya',
  networks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Write one safetensors file that kohya's scripts or diffusers read; layout: 'kohya' or 'peft'.

  With a 'text_encoder_2', even empty, kohya's names of the first encoder are those of Stable
  Diffusion XL; see `kohya_start`. networks: parameters (or their shapes) by role, with which
  kohya's layers of a transformer are those of its original files, where it has any.
  """
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  unknown = sorted(set(lora) - set(KOHYA))
  require(not unknown, f'A LoRA has the roles {", ".join(KOHYA)}, not {", ".join(unknown)}.')
  tensors: dict[str, np.ndarray] = {}
  texts: dict[str, Any] = {}
  for role, weights in lora.items():
    prefix = kohya_start(role, weights, lora)
    known = layers((networks or {}).get(role, {}))
    if layout == 'kohya' and (rows := original_rows(known, written=True)):
      prefix, weights = ORIGINAL, _original(weights, rows, joined_layers(known))
    for layer, one in weights.items():
      a, b = (to_published_layout('kernel.kernel', value) for value in (one.a, one.b))
      if layout == 'peft':
        tensors |= {f'{role}.{layer}.lora_A.weight': a, f'{role}.{layer}.lora_B.weight': b}
        continue
      stem = prefix + layer.replace('.', '_')
      tensors |= {
        f'{stem}.lora_down.weight': a, f'{stem}.lora_up.weight': b,
        f'{stem}.alpha': np.array(one.alpha, np.float32),
      }
    if layout == 'peft' and weights:
      texts |= {f'{role}.{key}': value for key, value in _peft_config(weights).items()}
  text = {METADATA: json.dumps(texts, indent=2, sort_keys=True)} if texts else {}
  write_tensors(path, tensors, text)


def _original(
  weights: Mapping[str, LoRAWeights], rows: Iterable[Row], joined: Mapping[str, Joined]
) -> dict[str, LoRAWeights]:
  """Adapters by the names of original files."""
  have = [row for row in rows if any(name in weights for name in row.published)]
  return {
    row.stored: join(weights, joined[row.stored], "kohya's files") if row.stored in joined
    else weights[row.published[0]] for row in have
  }


def _peft_config(weights: Mapping[str, LoRAWeights]) -> dict[str, Any]:
  """Arguments of PEFT's LoraConfig for these adapters."""
  # PEFT matches the ends of names, so that without the tower's prefix both spellings fit.
  sizes = {layer.removeprefix(TOWER): one.size for layer, one in weights.items()}
  common = lambda values: collections.Counter(values).most_common(1)[0][0]
  rank = common(size.rank for size in sizes.values())
  alpha = common(size.alpha for size in sizes.values())
  return {
    'r': rank, 'lora_alpha': alpha, 'target_modules': sorted(sizes),
    'rank_pattern': {n: s.rank for n, s in sizes.items() if s.rank != rank},
    'alpha_pattern': {n: s.alpha for n, s in sizes.items() if s.alpha != alpha},
  }
