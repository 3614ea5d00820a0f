"""The record of a checkpoint: files, arrays, their digests, the loader's position.

STEP/manifest.json lists all files; it is read first and checks itself. Of array files it has only
the size: digests of the arrays (`digests`) check the content. Every process writes its summands
into STEP/record, process 0 the rest.

All readers reach the same verdict, even where one alone meets the fault: each stage ends in an
agreement, and none waits for a process that may have failed.
"""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.checkpoint.digests import add_up, digests
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line, free_name, parse_json, read_object
from diffusion_jax.parallel.processes import in_step

MANIFEST, RECORD, QUARANTINE = 'manifest.json', 'record', 'quarantine'


class Damaged(Exception):
  """Files that differ from what was saved; the message names the part and the fault."""


_sha256 = lambda text: hashlib.sha256(text).hexdigest()


def _content(path: Path) -> bytes:
  if not path.is_file():  # A pipe would wait for a writer for ever.
    raise FileNotFoundError(errno.ENOENT, 'no regular file', str(path))
  return path.read_bytes()


def write_manifest(folder: Path) -> None:
  """List all files that are in `folder` now. OSError where one cannot be read or written."""
  files = {
    str(path.relative_to(folder)): [
      path.stat().st_size,
      # OCDBT calls the folder of its data 'd'.
      '' if path.parent.name == 'd' else _sha256(path.read_bytes()),
    ]
    for path in sorted(folder.rglob('*')) if path.is_file()
  }
  text = json.dumps(files, indent=0)
  (folder / MANIFEST).write_text(f'{_sha256(text.encode())}\n{text}', encoding='utf-8')


def fingerprint(folder: Path) -> str:
  """Return what changes with the content of a checkpoint; '' where there is none."""
  try:
    return _content(folder / MANIFEST).partition(b'\n')[0].decode(errors='replace')
  except OSError:
    return ''


def check_manifest(folder: Path, parts: Sequence[str]) -> None:
  """Raise Damaged or OSError where the list, or a file below `parts`, is missing, cut or wrong."""
  try:
    own, _, text = _content(folder / MANIFEST).partition(b'\n')
    if own.decode(errors='replace') != _sha256(text):
      raise Damaged(f'{MANIFEST} is not what was saved')
    for name, (size, digest) in parse_json(text).items():
      if Path(name).parts[0] not in parts:
        continue
      found = os.stat(folder / name).st_size
      if found != size:
        raise Damaged(f'{name} has {found} bytes instead of {size}')
      if digest and _sha256(_content(folder / name)) != digest:
        raise Damaged(f'{name} is not what was saved')
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    raise Damaged(f'{Path(error.filename).relative_to(folder)} is missing') from error
  except (ValueError, TypeError, AttributeError, IndexError) as error:
    raise Damaged(f'{MANIFEST} cannot be understood') from error


def describe(tree: Any) -> dict[str, list]:
  """Return {path of a leaf: [shape, type]} of a pytree of arrays or of their shapes."""
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def write_digests(folder: Path, parts: dict[str, dict]) -> None:
  """Write this process's summands: {item: {path of a leaf: two sums}}."""
  file = folder / RECORD / f'digests_{jax.process_index()}.json'
  file.write_text(json.dumps(parts), encoding='utf-8')


def write_record(folder: Path, step: int, arrays: dict[str, dict], data: Any) -> None:
  """Write what `describe` gives for every item, and the loader's position; process 0 alone."""
  values = {'step': step, 'arrays': arrays, 'data': data, 'processes': jax.process_count()}
  (folder / RECORD / 'record.json').write_text(json.dumps(values), encoding='utf-8')


def read_record(folder: Path) -> tuple[dict[str, dict], dict[str, dict], Any]:
  """(arrays of every item, their digests, position of the data loader); or Damaged."""
  try:
    record = read_object(folder / RECORD / 'record.json')
    parts = [
      read_object(folder / RECORD / f'digests_{index}.json') for index in range(record['processes'])
    ]
    digests = {item: add_up([part[item] for part in parts]) for item in record['arrays']}
    arrays, data = record['arrays'], record['data']
    step = record.get('step', int(folder.name))  # Older ones do not say; their arrays do.
  except Exception as error:  # Whatever comes of a file that holds something else.
    raise Damaged(f'{RECORD} cannot be read: {error}') from error
  check_step(folder, step)
  return arrays, digests, data


def check_step(folder: Path, step: Any) -> None:
  """Raise Damaged where a folder of another step was renamed, copied or linked to this name."""
  if step != int(folder.name):
    raise Damaged(f'it is the checkpoint of step {step} under another name')


def check_arrays(
  folder: Path, saved: dict[str, dict], wanted: dict[str, dict], everything: bool
) -> None:
  """Raise UserError, naming the first item, leaf, shape or type that differs from what was saved.

  everything: whether an item that is saved but not wanted counts as a difference.
  """
  def differs(what: str) -> UserError:
    return UserError(
      f'the checkpoint {folder} is of another model: {what}; choose another workdir, or go back to '
      'the config that it was trained with.'
    )

  there = _flat({k: v for k, v in saved.items() if everything or k in wanted})
  here = _flat(wanted)
  for name in sorted(there.keys() | here.keys()):  # An item comes before its leaves.
    if name not in there:
      raise differs(f'it holds no {name}')
    if name not in here:
      raise differs(f'it holds {name}, which is not known here')
    if there[name] != here[name]:
      (shape, dtype), (other, other_dtype) = there[name], here[name]
      raise differs(f'{name} is {dtype}{shape} there and {other_dtype}{other} here')


def _flat(items: dict[str, dict]) -> dict[str, Any]:
  """Return items, and below each its leaves, by name."""
  return dict.fromkeys(items) | {
    f'{item}{path}': leaf for item, leaves in items.items() for path, leaf in leaves.items()
  }


def quarantine(directory: Path, step: int) -> Path:
  """Move `directory`/STEP, for inspection, to quarantine/STEP, STEP-2, ...; or OSError."""
  folder = directory / QUARANTINE
  folder.mkdir(exist_ok=True)
  return (directory / str(step)).rename(free_name(folder / str(step)))


NOT_DAMAGE = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED')
"""Words of storage that do not say that the files are bad."""


def read_step(folder: Path, wanted: dict[str, Any], everything: bool) -> tuple[dict[str, Any], Any]:
  """Read the wanted items onto their shardings, and the loader's position; all processes together.

  wanted: item -> pytree of jax.ShapeDtypeStruct with shardings. everything: as in `check_arrays`.
  Damaged: the content differs from what was saved. UserError: another model, or a fault of reading.
  """
  kinds = (Damaged, UserError)
  saved_digests, data = in_step('opening', lambda: _open(folder, wanted, everything), kinds)
  trees = in_step('reading', lambda: _read_arrays(folder, wanted), kinds)
  for item, tree in trees.items():
    for leaf, found in digests(tree).items():
      if saved_digests[item].get(leaf) != found:
        raise Damaged(f'{item}{leaf} is not what was saved')
  state = trees.get('rest')
  if isinstance(state, dict) and 'step' in state:
    check_step(folder, int(state['step']))
  return trees, data


def _open(folder: Path, wanted: dict[str, Any], everything: bool) -> tuple[dict[str, dict], Any]:
  """Return (digests of every item, position of the data loader), once the files are those saved."""
  try:
    if jax.process_index() == 0:  # The same files for all, so one looks.
      check_manifest(folder, (RECORD, *wanted))
    arrays, saved_digests, data = read_record(folder)
  except OSError as error:
    if error.errno == errno.EIO:
      raise Damaged(f'{error.filename}: {error.strerror}') from error
    raise _unreadable(folder, error) from error
  shapes = {item: describe(tree) for item, tree in wanted.items()}
  check_arrays(folder, arrays, shapes, everything)
  return saved_digests, data


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
  # Not through a Checkpointer, which waits for all processes at its end.
  handler = ocp.StandardCheckpointHandler()
  try:
    return {
      item: handler.restore(epath.Path(folder / item), args=ocp.args.StandardRestore(tree))
      for item, tree in wanted.items()
    }
  except Exception as error:  # Orbax and its storage raise many kinds, some of them bare.
    if isinstance(error, MemoryError) or any(word in str(error) for word in NOT_DAMAGE):
      raise _unreadable(folder, error) from error
    raise Damaged(first_line(error)) from error
  finally:
    handler.close()


def _unreadable(folder: Path, error: Exception) -> UserError:
  return UserError(
    f'the checkpoint {folder} cannot be read ({first_line(error)}); make it readable and start '
    'again.'
  )
