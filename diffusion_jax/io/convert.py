"""Our parameter names and layouts <-> those of the published (PyTorch) checkpoints.

Modules are named alike, so only leaves differ: kernel, scale and embedding are all `weight`, a
convolution is stored [o i h w] instead of [h w i o], a matrix [out in] instead of [in out]. Both
directions are total: a missing, unused or misshapen tensor is an error that names it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.models.checks import require

_TO_PUBLISHED = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_PUBLISHED = {2: (1, 0), 4: (2, 3, 1, 0)}
_WEIGHTS = ('kernel', 'scale', 'embedding')
# Autoencoders saved before diffusers 0.18 name the parts of their attention so.
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def published_name(name: str) -> str:
  """'a.0.kernel' -> 'a.0.weight'; names without such a leaf, such as logit_scale, stay."""
  module, _, leaf = name.rpartition('.')
  return f'{module}.weight' if module and leaf in _WEIGHTS else name


def to_published(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Parameters by our dotted names -> contiguous arrays by published names, same dtypes."""
  out = {}
  for name, value in params.items():
    value = np.asarray(value)
    if name.endswith('.kernel'):
      value = value.transpose(_TO_PUBLISHED[value.ndim])
    key = published_name(name)
    require(key not in out, f'Two parameters would both be published as {key}; rename one.')
    out[key] = np.ascontiguousarray(value).reshape(value.shape)
  return out


def from_published(
  tensors: Mapping[str, np.ndarray], abstract_params: Mapping[str, Any], where: str
) -> dict[str, np.ndarray]:
  """Published tensors -> float32 parameters with the names and shapes of `abstract_params`.

  `where` names the source in errors. UserError if a tensor is missing, left over (except
  position_ids, which hold no weights) or of another shape.
  """
  tensors = {
    _current_name(name): value for name, value in tensors.items()
    if not name.endswith('position_ids')
  }
  wanted = {published_name(name): name for name in abstract_params}
  _same_names(set(tensors), set(wanted), where)
  params = {}
  for key, name in wanted.items():
    value = np.asarray(tensors[key])
    if name.endswith('.kernel') and value.ndim in _FROM_PUBLISHED:
      value = value.transpose(_FROM_PUBLISHED[value.ndim])
    expected = tuple(abstract_params[name].shape)
    require(
      value.shape == expected,
      f'{where}: {key} has shape {list(tensors[key].shape)}, which does not fit the config; '
      f'as {name} it must be {list(expected)}.',
    )
    params[name] = np.ascontiguousarray(value, np.float32).reshape(expected)
  return params


def _current_name(name: str) -> str:
  parts = name.split('.')
  if len(parts) >= 4 and parts[-4] == 'attentions':
    parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
  return '.'.join(parts)


def _same_names(have: set[str], want: set[str], where: str) -> None:
  missing, unused = sorted(want - have), sorted(have - want)
  some = lambda names: ', '.join(names[:3]) + (f' and {len(names) - 3} more' * (len(names) > 3))
  require(
    not missing,
    f'{where} lacks {some(missing)}; it does not hold the network that its config describes.',
  )
  require(
    not unused,
    f'{where} holds {some(unused)}, which the network of its config does not have.',
  )
