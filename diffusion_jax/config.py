"""From nested dictionaries to frozen dataclasses: every key known, used and of the right type."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from diffusion_jax.errors import UserError

T = TypeVar('T')


def typed(cls: type[T], values: Mapping[str, Any], where: str = '') -> T:
  """Builds the dataclass `cls` from `values`, section by section.

  Every key must be a field, so no key can be without effect; fields without default must be given.

  Raises:
    UserError: unknown key (with the nearest known one), missing key, or wrong type.
  """
  if not isinstance(values, Mapping):
    raise UserError(
      f'config.{where.rstrip(".")} is {values!r:.80}; it must be a section of keys.'
    )
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      close = difflib.get_close_matches(key, fields, n=1)
      hint = f'did you mean {where}{close[0]}?' if close else f'known: {", ".join(fields)}.'
      raise UserError(f'config.{where}{key} is not a known key; {hint}')
  for name, field in fields.items():
    no_default = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
    if name not in values and no_default:
      raise UserError(f'config.{where}{name} is missing; set it.')
  return cls(**{k: _convert(hints[k], value, f'{where}{k}') for k, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
  if hint is Any:
    return value
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return typed(hint, value, f'{where}.')
  if origin in (typing.Union, types.UnionType):
    for choice in typing.get_args(hint):
      try:
        return _convert(choice, value, where)
      except UserError:
        continue
    raise _wrong(hint, value, where)
  if origin is dict:
    if not isinstance(value, Mapping):
      raise _wrong(hint, value, where)
    of_value = typing.get_args(hint)[1]
    return {key: _convert(of_value, item, f'{where}.{key}') for key, item in value.items()}
  if hint is tuple or origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise _wrong(hint, value, where)
    arguments = typing.get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
      arguments = (arguments[0],) * len(value)
    if arguments and len(arguments) != len(value):
      raise _wrong(hint, value, where)
    items = zip(arguments or (Any,) * len(value), value, strict=True)
    return tuple(_convert(each, item, f'{where}[{i}]') for i, (each, item) in enumerate(items))
  return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
  if hint in (type(None), None) and value is None:
    return None
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  # bool is an int in Python, but a switch is no number.
  if hint in (int, float, str, bool) and type(value) is hint:
    return value
  raise _wrong(hint, value, where)


def _wrong(hint: Any, value: Any, where: str) -> UserError:
  name = getattr(hint, '__name__', str(hint))
  if typing.get_origin(hint) is not None:
    name = str(hint)
  return UserError(f'config.{where} is {value!r:.80}, a {type(value).__name__}; it must be {name}.')
