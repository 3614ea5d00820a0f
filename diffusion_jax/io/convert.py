"""Our parameter names and layouts <-> those of the published (PyTorch) checkpoints.

Modules are named alike, so only leaves differ: kernel, scale and embedding are all `weight`, a
convolution is stored [o i h w] instead of [h w i o], a matrix [out in] instead of [in out]. Both
directions are total: a missing, unused or misshapen tensor is an error that names it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.models.checks import require

_TO_PUBLISHED = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_PUBLISHED = {2: (1, 0), 4: (2, 3, 1, 0)}
_WEIGHTS = ('kernel', 'scale', 'embedding')


def published_name(name: str) -> str:
  """'a.0.kernel' -> 'a.0.weight'; names without such a leaf, such as logit_scale, stay."""
  module, _, leaf = name.rpartition('.')
  return f'{module}.weight' if module and leaf in _WEIGHTS else name


def published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape under which a parameter of ours is published."""
  if name.endswith('.kernel') and len(shape) in _TO_PUBLISHED:
    return tuple(shape[axis] for axis in _TO_PUBLISHED[len(shape)])
  return tuple(shape)


def to_published_layout(name: str, value: Any) -> np.ndarray:
  """Our parameter -> the array that is published, same type."""
  value = np.asarray(value)
  return value.transpose(_TO_PUBLISHED[value.ndim]) if name.endswith('.kernel') else value


def from_published_layout(name: str, value: Any) -> np.ndarray:
  """The published array -> our parameter, a view of it."""
  value = np.asarray(value)
  if name.endswith('.kernel') and value.ndim in _FROM_PUBLISHED:
    value = value.transpose(_FROM_PUBLISHED[value.ndim])
  return value


def to_published_names(names) -> dict[str, str]:
  """Our names -> published names, all different."""
  out: dict[str, str] = {}
  for name in names:
    key = published_name(name)
    require(key not in out.values(), f'Two parameters would both be published as {key}.')
    out[name] = key
  return out


def to_published(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Parameters by our dotted names -> contiguous arrays by published names, same dtypes."""
  names = to_published_names(params)
  out = {names[name]: to_published_layout(name, value) for name, value in params.items()}
  return {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in out.items()}


def match(
  tensors: Mapping[str, Any], shapes: Mapping[str, Any], where: str,
  rename: Callable[[str], str | None] = lambda name: name,
) -> dict[str, Any]:
  """Tensors by published names -> the same tensors, unread, by the names of `shapes`.

  Two tensors that `rename` gives one name are one parameter, stored twice. `where` names the
  source in errors. UserError if a tensor is missing, left over or of another shape.
  """
  found: dict[str, Any] = {}
  for name, tensor in tensors.items():
    key = rename(name)
    if key is not None:
      found.setdefault(key, tensor)
  wanted = {key: name for name, key in to_published_names(shapes).items()}
  same_names(set(found), set(wanted), where)
  for key, name in wanted.items():
    shape, expected = tuple(found[key].shape), published_shape(name, tuple(shapes[name].shape))
    require(
      shape == expected,
      f'{where}: {key} has shape {list(shape)}, which does not fit the config; it must be '
      f'{list(expected)}.',
    )
  return {name: found[key] for key, name in wanted.items()}


def from_published(
  tensors: Mapping[str, Any], shapes: Mapping[str, Any], where: str,
  rename: Callable[[str], str | None] = lambda name: name,
) -> dict[str, np.ndarray]:
  """Published tensors -> float32 parameters on the host with the names of `shapes`, as `match`."""
  return {
    name: np.ascontiguousarray(from_published_layout(name, tensor), np.float32).reshape(
      shapes[name].shape
    )
    for name, tensor in match(tensors, shapes, where, rename).items()
  }


def same_names(have: set[str], want: set[str], where: str) -> None:
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
