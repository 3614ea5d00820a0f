"""Where damaged checkpoints go: out of the way, but not deleted, for somebody may look at them."""

import os
from pathlib import Path

NAME = 'quarantine'


def quarantine(directory: Path, step: int) -> Path:
  """Moves `directory`/STEP to `directory`/quarantine/STEP, or STEP-2 and so on; the new path.

  Raises:
    OSError: it cannot be moved.
  """
  folder = directory / NAME
  folder.mkdir(exist_ok=True)
  target, number = folder / str(step), 1
  while os.path.lexists(target):
    number += 1
    target = folder / f'{step}-{number}'
  return (directory / str(step)).rename(target)


def quarantined(directory: Path) -> list[str]:
  """Names of what was moved there."""
  folder = directory / NAME
  return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
