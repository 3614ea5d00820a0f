"""The list of a checkpoint's files, by which missing, cut and changed ones are found.

It is read before anything else of a checkpoint, and guards itself. Files of array data are listed
with their size alone: what they hold is guarded by digests of the arrays (`io/digests`).
"""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.reading import parse_json

NAME = 'manifest.json'


class Damaged(Exception):
  """What is stored is not what was saved; the message says which part and how."""


def _is_array_data(path: Path) -> bool:
  return path.parent.name == 'd'  # So OCDBT calls the folder of its data.


def _sha256(text: bytes) -> str:
  return hashlib.sha256(text).hexdigest()


def write_manifest(folder: Path) -> None:
  """Lists all files that are in `folder` now.

  Raises:
    OSError: a file cannot be read, or the list not be written.
  """
  files = {
    str(path.relative_to(folder)): [
      path.stat().st_size, '' if _is_array_data(path) else _sha256(path.read_bytes())
    ]
    for path in sorted(folder.rglob('*')) if path.is_file()
  }
  text = json.dumps(files, indent=0)
  (folder / NAME).write_text(f'{_sha256(text.encode())}\n{text}', encoding='utf-8')


def _content(path: Path) -> bytes:
  if not path.is_file():  # A pipe would wait for a writer for ever.
    raise FileNotFoundError(errno.ENOENT, 'no regular file', str(path))
  return path.read_bytes()


def seal(folder: Path) -> str:
  """What a checkpoint's list is sealed with, which changes with its content; '' without a list."""
  try:
    return _content(folder / NAME).partition(b'\n')[0].decode(errors='replace')
  except OSError:
    return ''


def check_manifest(folder: Path, parts: Sequence[str]) -> None:
  """Compares the files below the given parts of `folder` with the list.

  Raises:
    Damaged: the list or a file is missing, cut or changed.
    OSError: a file cannot be read for another reason.
  """
  try:
    seal, _, text = _content(folder / NAME).partition(b'\n')
    if seal.decode(errors='replace') != _sha256(text):
      raise Damaged(f'{NAME} is not what was saved')
    for name, (size, seal) in parse_json(text).items():
      if Path(name).parts[0] not in parts:
        continue
      found = os.stat(folder / name).st_size
      if found != size:
        raise Damaged(f'{name} has {found} bytes instead of {size}')
      if seal and _sha256(_content(folder / name)) != seal:
        raise Damaged(f'{name} is not what was saved')
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    raise Damaged(f'{Path(error.filename).relative_to(folder)} is missing') from error
  except (ValueError, TypeError, AttributeError, IndexError) as error:
    raise Damaged(f'{NAME} cannot be understood') from error
