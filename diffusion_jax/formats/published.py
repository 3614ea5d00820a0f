"""Our parameter names and layouts <-> those of the published (PyTorch) checkpoints.

Modules are named alike, so only leaves differ: kernel, scale and embedding are all `weight`, a
convolution is stored [o i h w] instead of [h w i o], a matrix [out in] instead of [in out]. Both
directions are total: a missing, unused or misshapen tensor is an error that names it.

Our configs <-> the config.json of diffusers and transformers: what all families share.

Reading accepts a key that is not ours only with the values under which the published network
computes what ours does; anything else is an error that names the key.
"""

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.models.checks import require, shown

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


ANY = object()  # The key has no effect on the network.
_LARGEST, _LONGEST = 1e6, 200  # Of a factor, and of a name.


def parse_config(
  cls: type, values: Mapping[str, Any], accepted: Mapping[str, Any], where: str
) -> Any:
  """A `cls` from those of `values` that are its fields, after judging all the others.

  Every field has the type that `cls` says, its numbers are finite, and null stands for the default
  where the type does not have it.
  """
  hints = typing.get_type_hints(cls)
  for key, value in values.items():
    if key in hints or key.startswith('_') or value is None:
      continue
    require(
      key in accepted and (accepted[key] is ANY or accepted[key] == value),
      f'{where}: {key[:60]}={shown(value)} is not implemented'
      + (f' (only {accepted[key]!r} is).' if key in accepted else '; such a model cannot be read.'),
    )
  fields = {key: value for key, value in values.items() if key in hints}
  fields = {k: v for k, v in fields.items() if v is not None or type(None) in _choices(hints[k])}
  try:
    return cls(**{key: _typed(hints[key], value, key) for key, value in fields.items()})
  except UserError as error:
    raise UserError(f'{where}: {error}') from None


def _choices(hint: Any) -> tuple[Any, ...]:
  return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _typed(hint: Any, value: Any, key: str) -> Any:
  """A value of JSON as its field's type, lists as tuples. UserError where it is of another."""
  for choice in _choices(hint):
    if isinstance(value, list | tuple) and typing.get_origin(choice) is tuple:
      inner = typing.get_args(choice)[0]
      if all(_is(inner, one) for one in value):
        return tuple(value)
    elif _is(choice, value):
      return value
  names = [getattr(c, '__name__', str(c)).replace('NoneType', 'null') for c in _choices(hint)]
  raise UserError(f'{key} is {shown(value)}; it must be {" or ".join(names)}.')


def _is(kind: Any, value: Any) -> bool:
  if kind is float:
    return type(value) in (int, float) and abs(value) <= _LARGEST
  return type(value) is kind and (kind is not str or len(value) <= _LONGEST)
