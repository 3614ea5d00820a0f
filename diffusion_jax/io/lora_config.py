"""PEFT's LoraConfig beside the tensors of a LoRA: what it says of each layer, checked.

diffusers keeps one for each role in the file's own metadata, PEFT in adapter_config.json.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.io.name_patterns import NamePatterns
from diffusion_jax.io.tensors import metadata, read_json
from diffusion_jax.links import inside
from diffusion_jax.models.checks import require
from diffusion_jax.reading import parse_json, reading

METADATA = 'lora_adapter_metadata'
BESIDE = 'adapter_config.json'
MOST_SCALE = 1e4
"""Of alpha / rank; trainers write 0.01 to 10."""

_NOT_IMPLEMENTED = (
  'use_dora', 'lora_bias', 'use_qalora', 'use_bdlora', 'arrow_config', 'kasa_config',
  'monteclora_config', 'alora_invocation_tokens', 'layer_replication',
)
# Others change the weights that the adapter is added to before it is trained, or may.
_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """One role's. `where` names it in errors; alpha None: the rank; rank None: not said."""

  where: str
  alpha: float | None
  rank: int | None
  alphas: NamePatterns
  ranks: NamePatterns
  rank_stabilised: bool

  def alpha_of(self, names: Iterable[str], rank: int) -> float:
    """The alpha of a layer by the names that it may go by; UserError for another rank."""
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
  """UserError unless alpha / rank is a number that a LoRA may be scaled by."""
  require(
    math.isfinite(alpha) and abs(alpha) <= MOST_SCALE * rank,
    f'{where} is {alpha:g} for the rank {rank}; it must be a finite number of at most '
    f'{MOST_SCALE:g} times the rank.',
  )


def read_configs(path: Path, roles: Iterable[str], *, alone: bool) -> dict[str, AdapterConfig]:
  """The configs of the roles that the file, or BESIDE it where it is PEFT's `alone`, tells.

  Raises:
    UserError: what is no config, or one of an adapter that is not implemented.
  """
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
  require(kind in ('LORA', None), f'{where}: peft_type={_shown(kind)} is not implemented.')
  for key in _NOT_IMPLEMENTED:
    require(not values.get(key), f'{where}: {key} is not implemented.')
  require(
    any(start is known or (isinstance(known, str) and start == known) for known in _STARTS),
    f'{where}: init_lora_weights={_shown(start)} changes the weights that the LoRA is added to; '
    "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion.",
  )
  return AdapterConfig(
    where, _number(values.get('lora_alpha'), f'{where}: lora_alpha'),
    _number(values.get('r'), f'{where}: r', whole=True),
    _patterns(values, 'alpha_pattern', where), _patterns(values, 'rank_pattern', where, whole=True),
    bool(values.get('use_rslora')),
  )


def _patterns(
  values: Mapping[str, Any], key: str, where: str, whole: bool = False
) -> NamePatterns:
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
    f'{where} is {_shown(value)}; it must be a {"positive whole " * whole}number.',
  )
  return value if whole else float(value)


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:40]}...'
