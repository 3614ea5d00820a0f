"""What a run is trained on, in its workdir, so that other data are noticed when it goes on."""

import sys

from diffusion_jax.errors import UserError
from diffusion_jax.io.checkpoint import STEP
from diffusion_jax.io.run_directory import RunDirectory
from diffusion_jax.io.set_aside import set_aside_damaged
from diffusion_jax.reading import read_object

NAME = 'data.json'

Found = dict[str, dict[str, str]]
"""Split -> part of it, such as captions -> its hash."""


def check_data(directory: RunDirectory, found: Found) -> None:
  """UserError where a run that has saved was trained on other data than these."""
  if (other := other_data(directory, found)) and _has_saved(directory):
    raise UserError(
      f'{other} are not those that {directory.path} was trained on; restore them, or begin another '
      f'run from its weights with --config.weights_from={directory.path}.'
    )


def other_data(directory: RunDirectory, found: Found) -> str:
  """What of the data has changed since a run was begun, such as 'the captions of the test split'.

  '' where nothing has, as far as is known.
  """
  path = directory.path / NAME
  if not path.exists():
    return ''
  try:
    before = read_object(path)
  except UserError as error:
    print(f'note: whether the data are still the same cannot be told, as {error}', file=sys.stderr)
    return ''
  for split, parts in found.items():
    known = before.get(split)
    for part, value in parts.items():
      if isinstance(known, dict) and known.get(part, value) != value:
        return f'the {part} of the {split} data'
  return ''


def write_data(directory: RunDirectory, found: Found) -> None:
  """Keeps what a run is trained on.

  Raises:
    OSError: it is not known yet, and cannot be written.
  """
  if not any(found.values()):
    return
  try:
    if directory.read_json(NAME) == found:
      return
  except UserError:  # None yet, or damaged.
    set_aside_damaged(directory.path / NAME, lambda text: print(f'note: {text}', file=sys.stderr))
  directory.write_json(NAME, found)


def _has_saved(directory: RunDirectory) -> bool:
  folder = directory.checkpoints
  return folder.is_dir() and any(STEP.fullmatch(path.name) for path in folder.iterdir())
