"""PEFT's configs of adapters: what they say beside a file's matrices, and those that we write."""

import collections
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import require, shown
from diffusion_jax.files import inside, parse_json, reading
from diffusion_jax.formats.adapter_names import TOWER
from diffusion_jax.formats.tensors import metadata, read_json
from diffusion_jax.models.adapters import BIAS, block_size, factors
from diffusion_jax.models.name_patterns import NamePatterns

METADATA = 'lora_adapter_metadata'
BESIDE = 'adapter_config.json'
PEFT_TYPES = {'lora': 'LORA', 'loha': 'LOHA', 'lokr': 'LOKR', 'oft': 'OFT'}
"""Kinds of adapters -> their names in PEFT."""
MOST_TERMS = 100
MOST_SCALE = 1e4
"""Largest alpha / rank; trainers write 0.01 to 10."""

_NOT_IMPLEMENTED = (
  'use_qalora', 'use_bdlora', 'arrow_config', 'kasa_config',
  'monteclora_config', 'alora_invocation_tokens', 'layer_replication', 'coft',
)
EXTRAS = {'use_dora': 'vector', 'lora_bias': 'bias'}
"""Keys -> the part that each layer then has, see `formats.adapter_names`."""
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
  terms: int = 0
  """Of OFT's series; 0: its rotations are exact."""
  kind: str | None = None
  """In PEFT; None: not said."""
  extras: tuple[str, ...] = ()
  """Keys of EXTRAS that it sets."""

  def alpha_of(self, names: Iterable[str], rank: int | None) -> float:
    """Return the alpha of a layer by its possible names; UserError for another rank.

    rank None: the matrices do not say it; the alpha is for a rank of 1.
    """
    names = tuple(names)
    said = self.ranks.find(names, self.rank)
    if rank is None:
      require(said is not None, f'{self.where} has no r, by which {names[0]} is scaled; give it.')
      return self.alpha_of(names, said) / said
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
  require(
    kind in (*PEFT_TYPES.values(), None),
    f'{where}: peft_type={shown(kind)} is not implemented.',
  )
  for key in _NOT_IMPLEMENTED:
    require(not values.get(key), f'{where}: {key} is not implemented.')
  require(
    any(start is known or (isinstance(known, str) and start == known) for known in _STARTS),
    f'{where}: init_lora_weights={shown(start)} changes the weights that the LoRA is added to; '
    "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion.",
  )
  alpha = 'lora_alpha' if kind in ('LORA', None) else 'alpha'
  return AdapterConfig(
    where, _number(values.get(alpha), f'{where}: {alpha}'),
    None if kind == 'OFT' else _number(values.get('r'), f'{where}: r', whole=True),
    _patterns(values, 'alpha_pattern', where), _patterns(values, 'rank_pattern', where, whole=True),
    bool(values.get('use_rslora')), _terms(values, where) if kind == 'OFT' else 0,
    kind if 'peft_type' in values else None,
    tuple(key for key in EXTRAS if values.get(key)),
  )


def _terms(values: Mapping[str, Any], where: str) -> int:
  """Terms of OFT's series, as many as PEFT takes by default."""
  if not values.get('use_cayley_neumann', True):
    return 0
  terms = _number(values.get('num_cayley_neumann_terms', 5), f'{where}: terms', whole=True)
  require(
    terms is not None and terms <= MOST_TERMS,
    f'{where}: num_cayley_neumann_terms is {terms}; give 1 to {MOST_TERMS}.',
  )
  return terms


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


def peft_config(weights: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments of PEFT's config for one network's adapters; {} for none.

  UserError: of several kinds, or of one that PEFT lacks or cannot size so.
  """
  # PEFT matches the ends of names, so that without the tower's prefix both spellings fit.
  ones = {layer.removeprefix(TOWER): one for layer, one in weights.items()}
  kinds = sorted({one.size.kind for one in ones.values()})
  if not kinds:
    return {}
  require(
    len(kinds) == 1 and kinds[0] in PEFT_TYPES,
    f'PEFT has no adapters of the kinds {" and ".join(kinds)} in one; write kohya.',
  )
  kind = kinds[0]
  require(
    kind == 'lora' or not any(one.size.dora for one in ones.values()),
    f'PEFT has no DoRA of the kind {kind}; write kohya.',
  )
  out: dict[str, Any] = {'target_modules': sorted(ones)}
  if kind != 'lora':
    out['peft_type'] = PEFT_TYPES[kind]
  if kind == 'oft':
    return out | _oft_config(ones)
  sizes = {n: _peft_size(one) for n, one in ones.items()}
  common = lambda values: collections.Counter(values).most_common(1)[0][0]
  rank, alpha = (common(values) for values in zip(*sizes.values(), strict=True))
  out |= {
    'r': rank, 'lora_alpha' if kind == 'lora' else 'alpha': alpha,
    'rank_pattern': {n: r for n, (r, _) in sizes.items() if r != rank},
    'alpha_pattern': {n: a for n, (_, a) in sizes.items() if a != alpha},
  }
  if kind == 'lora':
    dora, bias = {o.size.dora for o in ones.values()}, {BIAS in o.parts for o in ones.values()}
    require(
      len(dora) == len(bias) == 1,
      'PEFT has DoRA, or biases, in all adapters of a network or in none; write kohya.',
    )
    extras = {'use_dora': dora.pop(), 'lora_bias': bias.pop()}
    return out | {key: True for key, there in extras.items() if there}
  out['use_effective_conv2d'] = any({'t1', 't2'} & one.parts.keys() for one in ones.values())
  return out | (_lokr_config(ones) if kind == 'lokr' else {})


def _peft_size(one: Any) -> tuple[int, float]:
  """(rank, alpha), where PEFT makes a second factor whole by its rank."""
  rank, alpha = one.size.rank, one.size.alpha
  if one.size.kind == 'lokr' and 'w2' in one.parts:
    least = -(-max(one.parts['w2'].shape[:2]) // 2)
    rank, alpha = (rank, alpha) if rank >= least else (least, one.size.scale * least)
  return rank, alpha


def _lokr_config(ones: Mapping[str, Any]) -> dict[str, Any]:
  """The factor, one for all layers, with which PEFT makes parts of these sizes."""
  sides = {side for one in ones.values() for side in _sides(one.parts)}
  candidates = (-1, *sorted({size for pairs in sides for pair in pairs for size in pair}))
  fits = lambda factor: all(any(_split(a * b, factor) == (a, b) for a, b in s) for s in sides)
  factor = next(filter(fits, candidates), None)
  require(
    factor is not None, 'PEFT has one decompose_factor for all layers, but no factor gives the '
    "shapes of these; write kohya's files.",
  )
  both = any('w1_a' in one.parts for one in ones.values())
  return {'decompose_factor': factor, 'decompose_both': both}


def _split(size: int, factor: int) -> tuple[int, int]:
  """The factors of a size in PEFT, which are not sorted where the given one divides it."""
  return (factor, size // factor) if factor > 0 and not size % factor else factors(size, factor)


def _sides(parts: Mapping[str, Any]) -> tuple[tuple[tuple[int, int], ...], ...]:
  """(pairs of the sizes that both factors of LoKr may have) of outputs and of inputs.

  A matrix may have a window in its inputs, which it does not say.
  """
  first = parts['w1'].shape if 'w1' in parts else (len(parts['w1_a']), parts['w1_b'].shape[1])
  if 'w2' in parts:
    outputs, inputs = parts['w2'].shape[:2]
  else:
    outputs, inputs = parts['w2_a'].shape[1 if 't2' in parts else 0], parts['w2_b'].shape[1]
  whole = 'w2' in parts or 't2' in parts
  windows = [1] if whole else [k * k for k in range(1, 8) if inputs % (k * k) == 0]
  return ((first[0], outputs),), tuple((first[1], inputs // window) for window in windows)


def _oft_config(ones: Mapping[str, Any]) -> dict[str, Any]:
  found = {(block_size(o.parts['skew'].shape[1]), int(o.size.alpha)) for o in ones.values()}
  require(
    len(found) == 1, 'PEFT has one oft_block_size and one number of terms for all layers; these '
    f'have {len(found)}.',
  )
  ((block, terms),) = found
  return {
    'r': 0, 'oft_block_size': block, 'use_cayley_neumann': terms > 0,
    'num_cayley_neumann_terms': terms or 5,
    'block_share': all(len(one.parts['skew']) == 1 for one in ones.values()),
  }
