"""Files of low-rank adapters (Hu et al. 2022): kohya's layout, and that of PEFT and diffusers.

In memory a LoRA is {role: {layer: LoRAWeights}}; roles are 'unet', 'text_encoder' and
'text_encoder_2'. Arrays keep the type that they have in the file.
"""

import collections
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.io.convert import from_published_layout, to_published_layout
from diffusion_jax.io.lora_names import KOHYA, kohya_names, layers
from diffusion_jax.io.tensors import metadata, open_tensors, read_json, write_tensors
from diffusion_jax.models.checks import require
from diffusion_jax.models.lora import Rank

LAYOUTS = ('kohya', 'peft')
_FILES = ('pytorch_lora_weights.safetensors', 'adapter_model.safetensors')
_BARE = 'base_model.model.'
_METADATA = 'lora_adapter_metadata'
_TOWER = 'text_model.'
_KOHYA_PARTS = {'lora_down.weight': 'a', 'lora_up.weight': 'b', 'alpha': 'alpha'}
_PEFT_PARTS = {  # The last two pairs are those of diffusers' training scripts.
  '.lora_A.weight': 'a', '.lora_B.weight': 'b', '.lora.down.weight': 'a', '.lora.up.weight': 'b',
  '.lora_linear_layer.down.weight': 'a', '.lora_linear_layer.up.weight': 'b',
}


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
Place = tuple[str, str, str]
"""Role, layer and part ('a', 'b' or 'alpha') of one tensor of a file."""


def to_params(
  weights: Mapping[str, LoRAWeights]
) -> tuple[dict[str, Rank], dict[str, np.ndarray]]:
  """The adapters of one network as `models.lora.with_lora` takes them: (sizes, parameters)."""
  params = {}
  for name, one in weights.items():
    params |= {f'{name}.lora.a': one.a, f'{name}.lora.b': one.b}
  return {name: one.size for name, one in weights.items()}, params


def from_params(params: Mapping[str, Any], sizes: Mapping[str, Rank]) -> dict[str, LoRAWeights]:
  """Inverse of `to_params`; other parameters may be among them."""
  part = lambda name, which: np.asarray(params[f'{name}.lora.{which}'])
  return {n: LoRAWeights(part(n, 'a'), part(n, 'b'), size.alpha) for n, size in sizes.items()}


def read_lora(path: str | os.PathLike, networks: Mapping[str, Mapping[str, Any]]) -> LoRAs:
  """Reads a LoRA of any layout that `write_lora`, kohya's scripts, diffusers or PEFT write.

  Args:
    path: a safetensors file, or the directory that diffusers or PEFT wrote.
    networks: parameters (or their shapes) of the networks it is for, by role.

  Raises:
    UserError: what the networks lack or the file holds half, or in wrong shapes, all named at once.
  """
  require(bool(networks), 'read_lora needs the parameters of at least one network.')
  path = _find(Path(path))
  tensors = open_tensors(path)
  known = {role: layers(params) for role, params in networks.items()}
  kohya = any(name.startswith('lora_') for name in tensors)
  place = _kohya_place(known) if kohya else _peft_place(known, tensors, path)
  found: dict[tuple[str, str], dict[str, Any]] = {}
  unknown = []
  for name, tensor in tensors.items():
    if (where := place(name)) is None:
      unknown.append(name)
    else:
      found.setdefault(where[:2], {})[where[2]] = tensor
  configs = {} if kohya else _configs(path, known)
  problems = _some(unknown, 'no part of a LoRA of the given networks')
  return _assemble(found, known, configs, problems, path)


def _assemble(found, known, configs, problems: list[str], path: Path) -> LoRAs:
  out: LoRAs = {}
  half, misshapen = [], []
  for (role, layer), parts in found.items():
    if not {'a', 'b'} <= parts.keys():
      half.append(f'{role} {layer}')
      continue
    kernel = known[role][layer]
    a, b = (_reshape(parts[which], len(kernel)) for which in 'ab')
    rank = a.shape[-1]
    window = kernel[:-2]
    if a.shape != (*kernel[:-1], rank) or b.shape != (*(1 for _ in window), rank, kernel[-1]):
      shapes = ' and '.join(str(list(parts[which].shape)) for which in 'ab')
      misshapen.append(f'{role} {layer} ({shapes} for a kernel {list(kernel)})')
      continue
    if 'alpha' in parts:
      alpha = float(np.asarray(parts['alpha']).reshape(()))
    else:
      alpha = _alpha(configs.get(role), layer, rank)
    out.setdefault(role, {})[layer] = LoRAWeights(a, b, alpha)
  problems = [
    *problems, *_some(half, 'without its other matrix'), *_some(misshapen, 'of a wrong shape')
  ]
  require(not problems, f'{path} does not fit: {"; ".join(problems)}.')
  require(bool(out), f'{path} holds no LoRA.')
  return out


def _some(names: list[str], what: str) -> list[str]:
  more = f' and {len(names) - 3} more' * (len(names) > 3)
  return [f'{what}: {", ".join(sorted(names)[:3])}{more}'] if names else []


def _reshape(tensor: Any, dims: int) -> np.ndarray:
  """A published matrix in our layout; a window of 1x1 may be stored or not, whatever the layer."""
  value = np.array(tensor)
  if dims == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
    value = value[..., 0, 0]
  elif dims == 4 and value.ndim == 2:
    value = value[..., None, None]
  return np.ascontiguousarray(from_published_layout('kernel.kernel', value))


def _kohya_place(known) -> Callable[[str], Place | None]:
  stems = {
    prefix + stored: (role, layer)
    for role, names in known.items() for stored, layer in kohya_names(names).items()
    for prefix in KOHYA.get(role, ())
  }

  def place(name: str) -> Place | None:
    stem, _, rest = name.partition('.')
    known_here = stem in stems and rest in _KOHYA_PARTS
    return (*stems[stem], _KOHYA_PARTS[rest]) if known_here else None

  return place


def _peft_place(known, names, path: Path) -> Callable[[str], Place | None]:
  def split(name: str) -> tuple[str | None, str, str] | None:
    end = next((end for end in _PEFT_PARTS if name.endswith(end)), None)
    if end is None:
      return None
    layer = name.removesuffix(end).removeprefix(_BARE)
    role = next((role for role in (*KOHYA, *known) if layer.startswith(f'{role}.')), None)
    return role, layer.removeprefix(f'{role}.'), _PEFT_PARTS[end]

  bare = [one[1] for one in map(split, names) if one is not None and one[0] is None]
  fits = [role for role, have in known.items() if all(_layer(n, have) for n in bare)]
  require(
    not bare or len(fits) <= 1,
    f'{path} does not say whether it is for {" or ".join(fits)}; give one network alone.',
  )

  def place(name: str) -> Place | None:
    if (one := split(name)) is None:
      return None
    role = one[0] or next(iter(fits), next(iter(known)))
    layer = _layer(one[1], known.get(role, {}))
    return None if layer is None else (role, layer, one[2])

  return place


def _layer(name: str, known) -> str | None:
  """The layer of that name; transformers 5 leaves the prefix out of a text tower alone."""
  return next((one for one in (name, _TOWER + name) if one in known), None)


def _find(path: Path) -> Path:
  if not path.is_dir():
    return path
  found = next((path / name for name in _FILES if (path / name).is_file()), None)
  if found is None:
    raise UserError(f'{path} holds neither {" nor ".join(_FILES)}; give the file of a LoRA.')
  return found


def _configs(path: Path, known) -> dict[str, dict[str, Any]]:
  """PEFT's LoraConfig of each role, where the file or adapter_config.json beside it has one."""
  beside = path.parent / 'adapter_config.json'
  text = metadata(path).get(_METADATA)
  if text is not None:
    try:
      values = json.loads(text)
    except ValueError as error:
      raise UserError(f'{path}: {_METADATA} is not readable JSON ({error}).') from error
  elif path.name == _FILES[1] and beside.is_file():
    values = read_json(beside)
  else:
    return {}
  found = {}
  for role in known:
    start = f'{role}.'
    own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
    found[role] = own or {k: v for k, v in values.items() if '.' not in k}
    for key in ('use_dora', 'lora_bias'):
      require(not found[role].get(key), f'{path}: {key} is not implemented.')
  return found


def _alpha(config: Mapping[str, Any] | None, layer: str, rank: int) -> float:
  """As PEFT finds it: the first pattern that ends the layer's name, else the general value."""
  if not config:
    return float(rank)
  names = (layer, layer.removeprefix(_TOWER))
  hit = lambda key: any(re.match(rf'(.*\.)?({key})$', name) for name in names)
  patterns = config.get('alpha_pattern') or {}
  alpha = next((v for key, v in patterns.items() if hit(key)), config.get('lora_alpha', rank))
  return float(alpha) * (math.sqrt(rank) if config.get('use_rslora') else 1.0)


def write_lora(
  path: str | os.PathLike, lora: Mapping[str, Mapping[str, LoRAWeights]], layout: str = 'kohya'
) -> None:
  """Writes one safetensors file that kohya's scripts or diffusers read.

  Args:
    lora: by role. Where it has a 'text_encoder_2', even an empty one, kohya's names of the first
      encoder are those of Stable Diffusion XL.
    layout: 'kohya', or 'peft' for diffusers.
  """
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  unknown = sorted(set(lora) - set(KOHYA))
  require(not unknown, f'A LoRA has the roles {", ".join(KOHYA)}, not {", ".join(unknown)}.')
  tensors: dict[str, np.ndarray] = {}
  texts: dict[str, Any] = {}
  for role, weights in lora.items():
    prefix = KOHYA[role][-1 if 'text_encoder_2' in lora else 0]
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
  text = {_METADATA: json.dumps(texts, indent=2, sort_keys=True)} if texts else {}
  write_tensors(path, tensors, text)


def _peft_config(weights: Mapping[str, LoRAWeights]) -> dict[str, Any]:
  """The arguments of PEFT's LoraConfig that describe these adapters."""
  # PEFT matches the ends of names, so that without the tower's prefix both spellings fit.
  sizes = {layer.removeprefix(_TOWER): one.size for layer, one in weights.items()}
  common = lambda values: collections.Counter(values).most_common(1)[0][0]
  rank = common(size.rank for size in sizes.values())
  alpha = common(size.alpha for size in sizes.values())
  return {
    'r': rank, 'lora_alpha': alpha, 'target_modules': sorted(sizes),
    'rank_pattern': {n: s.rank for n, s in sizes.items() if s.rank != rank},
    'alpha_pattern': {n: s.alpha for n, s in sizes.items() if s.alpha != alpha},
  }
