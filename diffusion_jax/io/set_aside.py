"""Damaged files of a run that may be written anew: out of the way, but kept and told of."""

import os
from collections.abc import Callable
from pathlib import Path

from diffusion_jax.errors import UserError
from diffusion_jax.reading import first_line, read_object


def set_aside_damaged(path: Path, say: Callable[[str], None]) -> None:
  """Moves what should be a JSON object and is not to NAME.damaged.

  For files that only show something, or that say what can be found out again.
  """
  if not os.path.lexists(path):
    return
  try:
    read_object(path)
  except UserError as error:
    target, number = path.with_name(f'{path.name}.damaged'), 1
    while os.path.lexists(target):
      number += 1
      target = path.with_name(f'{path.name}.damaged-{number}')
    try:
      path.rename(target)
    except OSError as problem:
      say(f'{path} is damaged and cannot be moved ({first_line(problem)}).')
      return
    say(f'{str(error).rpartition(";")[0] or error}; it was moved to {target.name}.')
