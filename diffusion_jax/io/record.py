"""What a checkpoint says of itself: its arrays, their digests and where the data loader stood.

Every process writes its shares of the digests; process 0 writes all else beside them.
"""

import json
from pathlib import Path
from typing import Any

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.io.digests import add_up
from diffusion_jax.io.manifest import Damaged
from diffusion_jax.reading import read_object

NAME = 'record'


def describe(tree: Any) -> dict[str, list]:
  """{path of a leaf: [shape, type]} of a pytree of arrays or of their shapes."""
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def write_shares(folder: Path, shares: dict[str, dict]) -> None:
  """This process's shares of the digests: {item: {path of a leaf: two sums}}."""
  file = folder / NAME / f'digests_{jax.process_index()}.json'
  file.write_text(json.dumps(shares), encoding='utf-8')


def write_record(folder: Path, step: int, arrays: dict[str, dict], data: Any) -> None:
  """What `describe` gives for every item, and the position of the data loader; process 0 alone."""
  values = {'step': step, 'arrays': arrays, 'data': data, 'processes': jax.process_count()}
  (folder / NAME / 'record.json').write_text(json.dumps(values), encoding='utf-8')


def read_record(folder: Path) -> tuple[dict[str, dict], dict[str, dict], Any]:
  """(arrays of every item, digests of every item, position of the data loader).

  Raises:
    Damaged: a file is missing or cannot be understood, or it is the record of another step than the
      one that the folder is named after.
  """
  try:
    record = read_object(folder / NAME / 'record.json')
    shares = [
      read_object(folder / NAME / f'digests_{index}.json')
      for index in range(record['processes'])
    ]
    digests = {item: add_up([share[item] for share in shares]) for item in record['arrays']}
    arrays, data = record['arrays'], record['data']
    step = record.get('step', int(folder.name))  # Older ones do not say; their arrays do.
  except Exception as error:  # Whatever comes of a file that holds something else.
    raise Damaged(f'{NAME} cannot be read: {error}') from error
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
