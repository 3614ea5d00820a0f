"""Reads a checkpoint and makes sure of every part of it.

Every process comes to the same verdict, also where only one of them meets the fault: each stage
ends in an agreement, and no stage lets one process wait for another that may have failed.
"""

import errno
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion_jax.checkpoint import record
from diffusion_jax.checkpoint.digests import digests
from diffusion_jax.checkpoint.record import Damaged
from diffusion_jax.errors import UserError
from diffusion_jax.files import first_line
from diffusion_jax.parallel.processes import in_step

NOT_DAMAGE = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED')
"""Words of storage that do not say that the files are bad."""


def read_step(folder: Path, wanted: dict[str, Any], everything: bool) -> tuple[dict[str, Any], Any]:
  """Read the wanted items, onto the shardings of `wanted`, and the loader's position.

  All processes must call it together.

  Args:
    wanted: item -> pytree of jax.ShapeDtypeStruct with shardings.
    everything: whether an item that is saved but not wanted makes it a checkpoint of another model.

  Raises:
    Damaged: what is stored is not what was saved.
    UserError: the checkpoint is intact but of another model, or cannot be read for a reason that
      says nothing about the files.
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
    record.check_step(folder, int(state['step']))
  return trees, data


def _open(folder: Path, wanted: dict[str, Any], everything: bool) -> tuple[dict[str, dict], Any]:
  try:
    if jax.process_index() == 0:  # The same files for all, so one looks.
      record.check_manifest(folder, (record.RECORD, *wanted))
    arrays, saved_digests, data = record.read_record(folder)
  except OSError as error:
    if error.errno == errno.EIO:
      raise Damaged(f'{error.filename}: {error.strerror}') from error
    raise _unreadable(folder, error) from error
  shapes = {item: record.describe(tree) for item, tree in wanted.items()}
  record.check_arrays(folder, arrays, shapes, everything)
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
