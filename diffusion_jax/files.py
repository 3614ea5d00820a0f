"""Files that others write or read: bounded before they are parsed, written atomically.

Every fault of a file is one sentence. Links in a model's folder are followed within it, never out
of it: a received model may be published, and must not take other files along.
"""

import contextlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_jax.errors import UserError

MOST_BYTES = 2**26
"""In a JSON file: several times the largest tokenizer that is published."""
MOST_DEPTH = 100
"""Lists and objects within each other, which recursive functions must walk through."""
MOST_VALUES = 4_000_000
"""Lists, objects and values together, ten times such a tokenizer's. An empty list of three bytes
takes twenty times as much memory, and a microsecond."""
_MOST_DIGITS = 40
"""In a whole number: tokenizers of any length of text say 10^30."""
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


@contextlib.contextmanager
def reading(
  what: str | Path, fault: str = 'cannot be read', remedy: str = 'fetch or write it again'
) -> Iterator[None]:
  """Raise UserError, WHAT FAULT (REASON); REMEDY., in place of any other error within.

  Parsers of damaged files raise anything. Enter it for the reading of one file alone.
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
  """An error's message in one printable line of at most 200 characters."""
  return printable((str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.'))


def printable(text: str) -> str:
  """Return a name or a message as at most 200 characters that can be printed in one line."""
  text = text[:200]
  return text if text.isprintable() else text.encode('unicode_escape').decode()


def bounded_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
  """Return the content of a regular file of at most `most` bytes. UserError for anything else."""
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
  """The value of a JSON text in any encoding of Unicode; infinity and NaN are allowed.

  ValueError: no JSON, or deeper than MOST_DEPTH, a key twice, a lone surrogate, a number of more
  than 40 digits, more than MOST_VALUES values.
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
  _check_inside(value, bool(_SURROGATE.search(text)) or not isinstance(data, bytes))
  return value


def read_json(
  path: str | Path, most: int = MOST_BYTES, remedy: str = 'write or fetch it again'
) -> Any:
  """Return the value in a JSON file of at most `most` bytes; UserError for anything else."""
  data = bounded_bytes(path, most)
  try:
    return parse_json(data)
  except (ValueError, MemoryError) as error:
    raise UserError(f'{path} is not readable JSON ({first_line(error)}); {remedy}.') from error


def read_object(
  path: str | Path, most: int = MOST_BYTES, remedy: str = 'write or fetch it again'
) -> dict[str, Any]:
  """Return the JSON object in a file. UserError, naming it, where there is none."""
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


def _check_inside(value: Any, characters: bool) -> None:
  """Raise ValueError for what is nested too deep, with `characters` for half of one in a text."""
  kinds = (dict, list, str) if characters else (dict, list)
  stack = [(value, 0)]
  while stack:  # Without recursion, which is what is guarded against.
    value, depth = stack.pop()
    if isinstance(value, (dict, list)):
      if depth >= MOST_DEPTH:
        raise ValueError(f'it is nested more than {MOST_DEPTH} deep')
      inner = (*value, *value.values()) if isinstance(value, dict) else value
      stack += [(each, depth + 1) for each in inner if isinstance(each, kinds)]
    elif isinstance(value, str) and characters and value.encode(errors='ignore').decode() != value:
      raise ValueError('it holds half a character, a surrogate without the other')


@contextlib.contextmanager
def atomic_write(path: Path, *, flushed: bool = False) -> Iterator[BinaryIO]:
  """Open a file that replaces `path` on exit; its folder is made, and an exception changes nothing.

  Of several writers the last counts. flushed: sync first, so that it survives a loss of power.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Not by the process's number, which containers that share a folder have in common.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      if flushed:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def say(text: str, who: str = 'diffusion_jax train: ') -> None:
  """Print one line for people, which never raises: stderr may be on the same full disk."""
  with contextlib.suppress(OSError, ValueError):
    print(f'{who}{text}', file=sys.stderr, flush=True)


def free_name(path: Path) -> Path:
  """Return `path`, or PATH-2, PATH-3 and so on: the first that is not there."""
  found, number = path, 1
  while os.path.lexists(found):
    number += 1
    found = path.with_name(f'{path.name}-{number}')
  return found


def set_aside_damaged(path: Path, say: Callable[[str], None] = say) -> None:
  """Move a file, not a JSON object as it should be and easy to make again, to NAME.damaged."""
  if not os.path.lexists(path):
    return
  try:
    read_object(path)
  except UserError as error:
    target = free_name(path.with_name(f'{path.name}.damaged'))
    try:
      path.rename(target)
    except OSError as problem:
      say(f'{path} is damaged and cannot be moved ({first_line(problem)}).')
      return
    say(f'{str(error).rpartition(";")[0] or error}; it was moved to {target.name}.')


INDEX = 'model_index.json'
_ASSETS = Path(__file__).resolve().parent / 'assets'


def inside(path: Path, folder: Path) -> Path:
  """`path`, of the model in `folder`; UserError where a link on it leads out of the model.

  `folder` may be a part of a pipeline, or itself a link.
  """
  if folder.is_relative_to(_ASSETS):  # Installers may make links of the package's own files.
    return path
  root = folder.parent if (folder.parent / INDEX).is_file() else folder
  found = Path(os.path.realpath(path))
  if not any(found.is_relative_to(place) for place in _places(root)):
    raise UserError(
      f'{path} is a link that leads out of its model, to {found}; put the file itself there, or '
      'leave it out.'
    )
  return path


def check_folder(folder: Path) -> None:
  """Raise UserError for a special file, a link out of the folder, or a link to a folder."""
  for place, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = inside(Path(place, name), folder)
      if path.is_symlink() and path.is_dir():
        raise UserError(f'{path} is a link to a folder; put the folder itself there.')
      if not path.is_file() and not path.is_dir():
        raise UserError(f'{path} is neither a file nor a folder; leave it out.')


def _places(root: Path) -> list[Path]:
  """Return the folders that a model's links may lead to."""
  real = Path(os.path.realpath(root))
  # The cache of the hub has links from models--NAME/snapshots/REVISION to models--NAME/blobs.
  blobs = [
    above.parent / 'blobs' for above in real.parents
    if above.name == 'snapshots' and above.parent.name.startswith('models--')
  ]
  return [real, *(Path(os.path.realpath(place)) for place in blobs)]


class _Tolerant:
  """A text stream whose errors of storage are swallowed, with what it could not write."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def writelines(self, lines: Any) -> None:
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
  """Let nothing that is printed within raise: a log on a full disk must not end what it logs."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = map(_Tolerant, before)
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before
    for stream in before:
      _drop_what_cannot_be_written(stream)


def _drop_what_cannot_be_written(stream: Any) -> None:
  """Drop it, or Python would try once more when it ends, and leave with code 120."""
  try:
    stream.flush()
  except ValueError:  # It is closed.
    return
  except OSError:
    with contextlib.suppress(OSError, io.UnsupportedOperation):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())
      os.close(nowhere)
