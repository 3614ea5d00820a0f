"""Our configs <-> the config.json of diffusers and transformers: what all families share.

Reading accepts a key that is not ours only with the values under which the published network
computes what ours does; anything else is an error that names the key.
"""

import types
import typing
from collections.abc import Mapping
from typing import Any

from diffusion_jax.errors import UserError
from diffusion_jax.models.checks import require, shown

ANY = object()  # The key has no effect on the network.
_LARGEST, _LONGEST = 1e6, 200  # Of a factor, and of a name.


def ours(cls: type, values: Mapping[str, Any], accepted: Mapping[str, Any], where: str) -> Any:
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
