"""Files that others have written: bounded before they are parsed, and every fault one sentence."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UserError

MOST_BYTES = 2**26
"""Of a JSON file: several times the largest tokenizer that is published."""
MOST_DEPTH = 100
"""Of lists and objects within each other; what walks through them may call itself as often."""
MOST_VALUES = 4_000_000
"""Of all lists, objects and values together: ten times as many as such a tokenizer's. An empty list
of three bytes takes twenty times as much memory, and a microsecond."""
_MOST_DIGITS = 40
"""Of a whole number: tokenizers of any length of text say 10^30."""
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


@contextlib.contextmanager
def reading(
  what: str | Path, fault: str = 'cannot be read', remedy: str = 'fetch or write it again'
) -> Iterator[None]:
  """Makes one sentence, WHAT FAULT (REASON); REMEDY., of anything that a parser raises within.

  Parsers of damaged files raise whatever comes up on the way: lists of exceptions are never
  complete. Within stands nothing but the reading of one file.

  Raises:
    UserError: in place of any error; one from within is left as it is.
  """
  try:
    yield
  except UserError:
    raise
  except BaseException as error:
    # A panic of a parser in Rust is no Exception, so that nobody catches it by accident.
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise UserError(f'{what} {fault} ({first_line(error)}); {remedy}.') from error


def first_line(error: BaseException) -> str:
  """What an error says, in one line of at most 200 characters that can be printed."""
  return shown((str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.'))


def shown(text: str) -> str:
  """A name or a message from a file as at most 200 characters that can be printed in one line."""
  text = text[:200]
  return text if text.isprintable() else text.encode('unicode_escape').decode()


def bounded_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
  """The content of a regular file. UserError for anything else, or for more than `most` bytes."""
  path = Path(path)
  with reading(path):
    if not path.exists():
      raise UserError(f'There is no file {path}; check the path.')
    if not path.is_file():
      raise UserError(f'{path} is not a file; check the path.')
    with path.open('rb') as file:
      data = file.read(most + 1)
  if len(data) > most:
    raise UserError(f'{path} has more than {most:,} bytes, which none of its kind needs.')
  return data


def parse_json(data: bytes | str) -> Any:
  """The value of a JSON text, in any of Unicode's encodings, with or without a byte order mark.

  Infinity is allowed, as in published configs, and NaN, which only those who ask for a number can
  refuse.

  Raises:
    ValueError: it is no JSON, or not safe to hand on: deeper than MOST_DEPTH, a key twice in an
      object, half a character (a lone surrogate), a whole number of more than 40 digits, more than
      MOST_VALUES values.
  """
  text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
  if sum(map(text.count, ',[{')) > MOST_VALUES:
    raise ValueError(f'it holds more than {MOST_VALUES:,} values')
  try:
    value = json.loads(
      text.removeprefix('\ufeff'), parse_int=_whole_number, object_pairs_hook=_each_once
    )
  except RecursionError:
    raise ValueError(f'it is nested more than {MOST_DEPTH} deep') from None
  _check_depth(value)
  if _SURROGATE.search(text) or not isinstance(data, bytes):
    _check_characters(value)
  return value


def read_json(
  path: str | Path, most: int = MOST_BYTES, remedy: str = 'write or fetch it again'
) -> Any:
  """The value in a JSON file of at most `most` bytes. UserError, naming it, for anything else."""
  data = bounded_bytes(path, most)
  try:
    return parse_json(data)
  except (ValueError, MemoryError) as error:
    raise UserError(f'{path} is not readable JSON ({first_line(error)}); {remedy}.') from error


def read_object(
  path: str | Path, most: int = MOST_BYTES, remedy: str = 'write or fetch it again'
) -> dict[str, Any]:
  """The JSON object in a file. UserError, naming it, where there is none."""
  value = read_json(path, most, remedy)
  if not isinstance(value, dict):
    raise UserError(f'{path} must hold a JSON object; {remedy}.')
  return value


def _whole_number(text: str) -> int:
  if len(text) > _MOST_DIGITS:
    raise ValueError(f'a whole number of {len(text):,} digits')
  return int(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f'the key {twice[:100]!r} stands twice in one object')
  return values


def _containers(value: Any) -> Iterator[tuple[Any, int]]:
  """Every list and object with its depth, without recursion."""
  stack = [(value, 1)]
  while stack:
    value, depth = stack.pop()
    if isinstance(value, (dict, list)):
      yield value, depth
      inner = value.values() if isinstance(value, dict) else value
      stack += [(each, depth + 1) for each in inner if isinstance(each, (dict, list))]


def _check_depth(value: Any) -> None:
  if any(depth > MOST_DEPTH for _, depth in _containers(value)):
    raise ValueError(f'it is nested more than {MOST_DEPTH} deep')


def _check_characters(value: Any) -> None:
  values = [value, *(each for each, _ in _containers(value))]
  for each in values:
    texts = [*each, *each.values()] if isinstance(each, dict) else each
    for text in texts if isinstance(each, (dict, list)) else [each]:
      if isinstance(text, str) and not _encodes(text):
        raise ValueError('it holds half a character, a surrogate without the other')


def _encodes(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True
