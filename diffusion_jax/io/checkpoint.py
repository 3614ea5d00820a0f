"""Checkpoints of a whole training state, by Orbax, written in the background.

Orbax restores damaged array data in silence, so a digest of every leaf is saved and compared.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.errors import UserError
from diffusion_jax.io.digests import digests

ITEMS = ('params', 'opt_state', 'ema', 'rest')
"""Parts of a state that are stored apart, so that sampling reads only the parameters."""


class Checkpoints:
  """The checkpoints of one run, under `directory`/STEP."""

  def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
    self.directory = Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=not read_only, read_only=read_only,
        cleanup_tmp_directories=not read_only,
      ),
    )

  def latest(self) -> int | None:
    """The newest step that was saved, None when there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: dict[str, Any], data: dict) -> None:
    """Starts to save; returns before the files are written unless a save is still under way.

    Args:
      state: pytrees of arrays under the names in `ITEMS`; empty ones are left out.
      data: JSON-ready position of the data loader.
    """
    if step == self.latest():
      return
    full = {name: state[name] for name in ITEMS if _has_leaves(state[name])}
    parts = {name: ocp.args.StandardSave(tree) for name, tree in full.items()}
    record = {'position': data, 'digests': {name: digests(tree) for name, tree in full.items()}}
    self._manager.save(step, args=ocp.args.Composite(**parts, data=ocp.args.JsonSave(record)))

  def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    """(state, data position) of a step, onto the shardings of `abstract`.

    Raises:
      UserError: the checkpoint is damaged, or of another model.
    """
    wanted = {name: abstract[name] for name in ITEMS if _has_leaves(abstract[name])}
    restored, data = self._read(step, wanted)
    return {name: restored.get(name, abstract[name]) for name in ITEMS}, data

  def restore_params(self, step: int, abstract: dict[str, Any], ema: bool) -> dict[str, Any]:
    """Only the parameters of a step, averaged ones where `ema` says that there are some."""
    name = 'ema' if ema else 'params'
    return self._read(step, {name: abstract})[0][name]

  def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
    args['data'] = ocp.args.JsonRestore()
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**args))
      record, trees = restored['data'], {name: restored[name] for name in wanted}
      saved = record['digests']
    except Exception as error:  # Orbax and its storage raise many kinds, some of them bare.
      reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
      raise self._unreadable(step, reason) from error
    for name, tree in trees.items():
      for leaf, found in digests(tree).items():
        if saved[name].get(leaf) != found:
          raise self._unreadable(step, f'{name}{leaf} is not what was saved')
    return trees, record['position']

  def _unreadable(self, step: int, reason: str) -> UserError:
    return UserError(
      f'the checkpoint {self.directory / str(step)} cannot be read ({reason}); delete that '
      'folder to go on from the one before it, or choose another workdir.'
    )

  def wait(self) -> None:
    """Blocks until every save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees threads."""
    self.wait()
    self._manager.close()


def _has_leaves(tree: Any) -> bool:
  return bool(jax.tree.leaves(tree))
