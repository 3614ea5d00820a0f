"""The list of a checkpoint's files, by which missing, cut and changed ones are found.

It is read before anything else of a checkpoint, and guards itself. Files of array data are listed
with their size alone: what they hold is guarded by digests of the arrays (`io/digests`).

Where damaged checkpoints go: out of the way, but not deleted, for somebody may look at them.

What a checkpoint says of itself: its arrays, their digests and where the data loader stood.

Every process writes its shares of the digests; process 0 writes all else beside them.
"""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.checkpoint.digests import add_up
from diffusion_jax.errors import UserError
from diffusion_jax.files import parse_json, read_object

MANIFEST = 'manifest.json'


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
  (folder / MANIFEST).write_text(f'{_sha256(text.encode())}\n{text}', encoding='utf-8')


def _content(path: Path) -> bytes:
  if not path.is_file():  # A pipe would wait for a writer for ever.
    raise FileNotFoundError(errno.ENOENT, 'no regular file', str(path))
  return path.read_bytes()


def seal(folder: Path) -> str:
  """What a checkpoint's list is sealed with, which changes with its content; '' without a list."""
  try:
    return _content(folder / MANIFEST).partition(b'\n')[0].decode(errors='replace')
  except OSError:
    return ''


def check_manifest(folder: Path, parts: Sequence[str]) -> None:
  """Compares the files below the given parts of `folder` with the list.

  Raises:
    Damaged: the list or a file is missing, cut or changed.
    OSError: a file cannot be read for another reason.
  """
  try:
    seal, _, text = _content(folder / MANIFEST).partition(b'\n')
    if seal.decode(errors='replace') != _sha256(text):
      raise Damaged(f'{MANIFEST} is not what was saved')
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
    raise Damaged(f'{MANIFEST} cannot be understood') from error


QUARANTINE = 'quarantine'


def quarantine(directory: Path, step: int) -> Path:
  """Moves `directory`/STEP to `directory`/quarantine/STEP, or STEP-2 and so on; the new path.

  Raises:
    OSError: it cannot be moved.
  """
  folder = directory / QUARANTINE
  folder.mkdir(exist_ok=True)
  target, number = folder / str(step), 1
  while os.path.lexists(target):
    number += 1
    target = folder / f'{step}-{number}'
  return (directory / str(step)).rename(target)


def quarantined(directory: Path) -> list[str]:
  """Names of what was moved there."""
  folder = directory / QUARANTINE
  return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


RECORD = 'record'


def describe(tree: Any) -> dict[str, list]:
  """{path of a leaf: [shape, type]} of a pytree of arrays or of their shapes."""
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def write_shares(folder: Path, shares: dict[str, dict]) -> None:
  """This process's shares of the digests: {item: {path of a leaf: two sums}}."""
  file = folder / RECORD / f'digests_{jax.process_index()}.json'
  file.write_text(json.dumps(shares), encoding='utf-8')


def write_record(folder: Path, step: int, arrays: dict[str, dict], data: Any) -> None:
  """What `describe` gives for every item, and the position of the data loader; process 0 alone."""
  values = {'step': step, 'arrays': arrays, 'data': data, 'processes': jax.process_count()}
  (folder / RECORD / 'record.json').write_text(json.dumps(values), encoding='utf-8')


def read_record(folder: Path) -> tuple[dict[str, dict], dict[str, dict], Any]:
  """(arrays of every item, digests of every item, position of the data loader).

  Raises:
    Damaged: a file is missing or cannot be understood, or it is the record of another step than the
      one that the folder is named after.
  """
  try:
    record = read_object(folder / RECORD / 'record.json')
    shares = [
      read_object(folder / RECORD / f'digests_{index}.json')
      for index in range(record['processes'])
    ]
    digests = {item: add_up([share[item] for share in shares]) for item in record['arrays']}
    arrays, data = record['arrays'], record['data']
    step = record.get('step', int(folder.name))  # Older ones do not say; their arrays do.
  except Exception as error:  # Whatever comes of a file that holds something else.
    raise Damaged(f'{RECORD} cannot be read: {error}') from error
  check_step(folder, step)
  return arrays, digests, data


def check_step(folder: Path, step: Any) -> None:
  """Makes sure that a folder that is named after a step holds that one.

  Raises:
    Damaged: it was renamed, copied or linked.
  """
  if step != int(folder.name):
    raise Damaged(f'it is the checkpoint of step {step} under another name')


def check_arrays(
  folder: Path, saved: dict[str, dict], wanted: dict[str, dict], everything: bool
) -> None:
  """Makes sure that the wanted arrays are those that were saved, with `everything` all of them.

  Raises:
    UserError: an item, a leaf, a shape or a type differs; the message names the first.
  """
  def differs(what: str) -> UserError:
    return UserError(
      f'the checkpoint {folder} is of another model: {what}; choose another workdir, or go back to '
      'the config that it was trained with.'
    )

  for item in sorted(wanted.keys() | saved.keys() if everything else wanted.keys()):
    if (item in saved) != (item in wanted):
      raise differs(f'it holds {"no " if item in wanted else ""}{item}')
    leaves = wanted[item]
    for path in sorted(leaves.keys() | saved[item].keys()):
      if path not in saved[item]:
        raise differs(f'it holds no {item}{path}')
      if path not in leaves:
        raise differs(f'it holds {item}{path}, which is not known here')
      if leaves[path] != saved[item][path]:
        (shape, dtype), (other, other_dtype) = saved[item][path], leaves[path]
        raise differs(f'{item}{path} is {dtype}{shape} there and {other_dtype}{other} here')
