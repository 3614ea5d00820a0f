"""configs: the recipes of the package, listed or copied."""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

from diffusion_jax.cli.options import add_options, read_options
from diffusion_jax.errors import UserError
from diffusion_jax.limits import Help

HELP = 'list the recipes of the package, or copy one to edit'
DESCRIPTION = """Lists all recipes, by which train --config runs them, each with what it is. A copy
runs from wherever it lies, and may be changed.

examples:
  python -m diffusion_jax configs
  python -m diffusion_jax configs --copy openmoji/quickstart --to mine.py"""


@dataclasses.dataclass(frozen=True)
class Options:
  """A recipe to copy, and where to."""

  copy: Annotated[str, Help('a recipe to copy', 'NAME')] = ''
  to: Annotated[str, Help(
    'where the copy goes, a new file or a folder (default: the name of the recipe, in this folder)',
    'FILE'
  )] = ''

  def __post_init__(self):
    if self.to and not self.copy:
      raise UserError('--to is for a copy; give --copy NAME, too.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_options(parser, Options)


def run(args: argparse.Namespace) -> int:
  """List, or copy."""
  options = read_options(Options, args)
  if options.copy:
    print(f'written to {copy(options.copy, Path(options.to or "."))}')
  else:
    print('\n'.join(listed()))
  return 0


def listed() -> list[str]:
  """Return a line for each recipe, after one with the name of its folder."""
  from diffusion_jax.recipe import recipes, summary

  known, lines = recipes(), []
  for folder, found in itertools.groupby(known, lambda name: name.partition('/')[0]):
    names = list(found)
    width = max(map(len, names))
    lines += [*[''] * bool(lines), folder]
    lines += [f'  {name:{width}}  {summary(known[name])}' for name in names]
  return lines


def copy(name: str, to: Path) -> Path:
  """Write a recipe to a new file, or into a folder under its own name; return the file.

  UserError: no such recipe, a file that is there already or that train would not take, or a place
  that cannot be written to.
  """
  from diffusion_jax.files import atomic_write
  from diffusion_jax.recipe import find_recipe

  recipe = find_recipe(name)
  to = to / recipe.name if to.is_dir() else to
  if to.exists():
    raise UserError(f'{to} is there already; give another file as --to.')
  if to.suffix != '.py':
    raise UserError(f'--to {to} is no name of a config; call it {to}.py.')
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(to) as file:
      file.write(recipe.read_bytes())
  except OSError as error:
    raise UserError(f'{to} cannot be written ({error}); give another place as --to.') from error
  return to
