"""Files of adapters, LoRA (Hu et al. 2022) and others, in all layouts of their usual trainers.

In memory they are {role: {layer: weights}}, see `formats.adapter_weights`; roles are 'unet' or
'transformer', 'text_encoder', 'text_encoder_2' and so on. Arrays keep the file's type. PEFT's
config is in the file's metadata, one for each role (diffusers), or in adapter_config.json (PEFT).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError, require
from diffusion_jax.files import inside
from diffusion_jax.formats.adapter_config import (
  BESIDE,
  METADATA,
  PEFT_TYPES,
  peft_config,
  read_configs,
)
from diffusion_jax.formats.adapter_layers import Joined, join, joined_layers, original_rows
from diffusion_jax.formats.adapter_names import (
  KOHYA,
  LYCORIS,
  LYCORIS_START,
  ORIGINAL,
  PEFT,
  is_inversion,
  kohya_start,
  layers,
  of_other_kinds,
  places,
)
from diffusion_jax.formats.adapter_weights import (
  Layer,
  LoRAWeights,
  Weights,
  read_layer,
  weights_of,
)
from diffusion_jax.formats.published import some, to_published_layout
from diffusion_jax.formats.tensors import PICKLES, open_tensors, write_tensors
from diffusion_jax.formats.torch_files import load_plain, tensors_of
from diffusion_jax.formats.transformer_names import Row
from diffusion_jax.models.adapters import BIAS, MAGNITUDE, WHOLE_BIAS, Rank
from diffusion_jax.models.lora import parts_of
from diffusion_jax.models.unet import UNetConfig

LAYOUTS = ('kohya', 'peft', 'lycoris')
_OF_PEFT = 'adapter_model'
_FILES = tuple(
  f'{stem}{end}' for end in ('.safetensors', '.bin') for stem in ('pytorch_lora_weights', _OF_PEFT)
)


LoRAs = dict[str, dict[str, Weights]]


def denoiser_role(config: Any) -> str:
  """Return the role of a denoiser with this config in files."""
  return 'unet' if isinstance(config, UNetConfig) else 'transformer'


def to_params(weights: Mapping[str, Weights]) -> tuple[dict[str, Rank], dict[str, np.ndarray]]:
  """Return the (sizes, parameters) of one network's adapters, for `models.lora.merge_lora`."""
  params = {
    f'{name}.lora.{part}': value
    for name, one in weights.items() for part, value in one.parts.items()
  }
  return {name: one.size for name, one in weights.items()}, params


def from_params(params: Mapping[str, Any], sizes: Mapping[str, Rank]) -> dict[str, Weights]:
  """Return the inverse of `to_params`; other parameters may be among them."""
  return {
    name: weights_of({part: np.asarray(value) for part, value in parts.items()}, sizes[name])
    for name, parts in parts_of(params, sizes).items()
  }


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
    several = joined[role].get(layer)
    own = (layer,) if several is None else several.parts
    kernel = known[role][layer] if several is None else several.kernel
    biased = all(f'{name}.bias' in networks[role] for name in own)
    try:
      new = read_layer(
        parts, names, Layer((role, layer), kernel, several, biased), configs.get(role)
      )
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


def lora_file(path: Path) -> Path:
  """Return the file of a LoRA, given itself or by its directory. UserError for none."""
  if not path.is_dir():
    return path
  found = next((inside(path / n, path) for n in _FILES if (path / n).is_file()), None)
  if found is None:
    raise UserError(f'{path} holds neither {" nor ".join(_FILES)}; give the file of a LoRA.')
  return found


def write_lora(
  path: str | os.PathLike, lora: Mapping[str, Mapping[str, Weights]], layout: str = 'kohya',
  networks: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Write one safetensors file in a layout of LAYOUTS: that of kohya's scripts, of diffusers
  ('peft') or of LyCORIS' own wrapper, which is of one network.

  With a 'text_encoder_2', even empty, kohya's names of the first encoder are those of Stable
  Diffusion XL; see `kohya_start`. networks: parameters (or their shapes) by role, with which
  kohya's layers of a transformer are those of its original files, where it has any and all are
  LoRA; else they have LyCORIS' names. UserError for a kind that the layout has no names for.
  """
  require(layout in LAYOUTS, f'layout must be one of {", ".join(LAYOUTS)}, not {layout!r}.')
  unknown = sorted(set(lora) - set(KOHYA))
  require(not unknown, f'A LoRA has the roles {", ".join(KOHYA)}, not {", ".join(unknown)}.')
  filled = [role for role, weights in lora.items() if weights]
  require(
    layout != 'lycoris' or len(filled) < 2,
    f'the layout lycoris is of one network, not of {" and ".join(filled)}; write kohya.',
  )
  tensors: dict[str, np.ndarray] = {}
  texts: dict[str, Any] = {}
  for role, weights in lora.items():
    known = layers((networks or {}).get(role, {}))
    if layout == 'peft':
      tensors |= _of_peft(weights, f'{role}.')
      texts |= {f'{role}.{key}': value for key, value in peft_config(weights).items()}
      continue
    prefix, plain = kohya_start(role, weights, lora), _plain(weights)
    if layout == 'lycoris':
      prefix = LYCORIS_START
    elif rows := original_rows(known, written=True):
      prefix = ORIGINAL if plain else LYCORIS_START
      weights = _original(weights, rows, joined_layers(known)) if plain else weights
    for layer, one in weights.items():
      tensors |= _of_lycoris(prefix + layer.replace('.', '_'), one)
  text = {METADATA: json.dumps(texts, indent=2, sort_keys=True)} if texts else {}
  write_tensors(path, tensors, text)


def write_peft(folder: str | os.PathLike, weights: Mapping[str, Weights]) -> None:
  """Write the folder of one network's adapters that PEFT reads; UserError for one that it lacks."""
  folder = Path(folder)
  config = {'peft_type': PEFT_TYPES['lora']} | peft_config(weights)
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder / f'{_OF_PEFT}.safetensors', _of_peft(weights, 'base_model.model.'), {})
  (folder / BESIDE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding='utf-8')


def fits_layout(weights: Mapping[str, Weights], layout: str) -> bool:
  """Return whether a layout has names and sizes for all these adapters."""
  if layout == 'peft':
    try:
      peft_config(weights)
    except UserError:
      return False
  return all(one.size.kind in (PEFT if layout == 'peft' else LYCORIS) for one in weights.values())


def _plain(weights: Mapping[str, Weights]) -> bool:
  return all(isinstance(one, LoRAWeights) for one in weights.values())


def _named(one: Weights, table: Mapping[str, Mapping[str, str]], what: str) -> dict[str, Any]:
  """An adapter's parts, but DoRA's, by their names in a table, published."""
  kind = one.size.kind
  require(kind in table, f'{what} has no names for the kind {kind}; use another layout.')
  require(
    one.size.rows is None, f'an adapter of several layers at once cannot be written for {what}; '
    'merge it into the model.',
  )
  return {
    table[kind][part]: to_published_layout('kernel.kernel', value) if kind == 'lora' else value
    for part, value in one.parts.items() if part in table[kind]
  }


def _of_lycoris(stem: str, one: Weights) -> dict[str, np.ndarray]:
  size = one.size
  out = {f'{stem}.{name}': value for name, value in _named(one, LYCORIS, "kohya's files").items()}
  if size.kind != 'full':
    out[f'{stem}.alpha'] = np.array(size.alpha, np.float32)
  if size.kind == 'lokr' and {'w1', 'w2'} <= one.parts.keys() and size.scale != 1:
    w1 = one.parts['w1']  # Two whole factors are not scaled there.
    out[f'{stem}.lokr_w1'] = (w1.astype(np.float32) * np.float32(size.scale)).astype(w1.dtype)
  if MAGNITUDE in one.parts:
    out[f'{stem}.dora_scale'] = one.parts[MAGNITUDE]
  require(BIAS not in one.parts, "kohya's files have no scaled biases; write the layout peft.")
  if WHOLE_BIAS in one.parts:
    out[f'{stem}.diff_b'] = one.parts[WHOLE_BIAS]
  return out


def _of_peft(weights: Mapping[str, Weights], start: str) -> dict[str, np.ndarray]:
  tensors = {}
  for layer, one in weights.items():
    named = _named(one, PEFT, 'PEFT')
    require(WHOLE_BIAS not in one.parts, 'PEFT has no whole biases; write the layout kohya.')
    if BIAS in one.parts:
      named['lora_B.bias'] = one.parts[BIAS]
    if MAGNITUDE in one.parts:
      norms = one.parts[MAGNITUDE]
      require(
        one.size.kind == 'lora' and norms.shape[0] == one.parts['b'].shape[-1],
        f'PEFT has DoRA by the outputs of LoRA alone, not what {layer} has; write kohya.',
      )
      shape = (1, -1, 1, 1) if norms.ndim == 4 else (-1,)
      named['lora_magnitude_vector'] = norms.reshape(shape)
    tensors |= {f'{start}{layer}.{name}': value for name, value in named.items()}
  return tensors


def _original(
  weights: Mapping[str, LoRAWeights], rows: Iterable[Row], joined: Mapping[str, Joined]
) -> dict[str, LoRAWeights]:
  """Adapters by the names of original files."""
  have = [row for row in rows if any(name in weights for name in row.published)]
  return {
    row.stored: join(weights, joined[row.stored], "kohya's files") if row.stored in joined
    else weights[row.published[0]] for row in have
  }
