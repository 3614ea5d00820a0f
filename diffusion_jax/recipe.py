"""Config files: those of the package by name, and any other; overrides from the command line."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import configs
from diffusion_jax.config import flatten
from diffusion_jax.errors import UserError


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Run a config file and apply overrides such as '--config.loop.batch_size=8'.

  Args:
    path: a file, or the name of a recipe of the package, such as openmoji/quickstart.
    overrides: '--config.KEY=VALUE', each of a key that the config has.

  Raises:
    UserError: no such file, an error in it, an unknown key or a value of the wrong type.
  """
  values = flags.FlagValues()
  arguments = ['diffusion_jax', f'--config={_find(path)}', *overrides]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=arguments)
  try:
    values(arguments)
    return values.config
  except UserError:
    raise
  except Exception as error:  # A config file is Python, so anything may come out of it.
    if overrides:
      _check_keys(load_config(path), overrides)
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name == 'configs':
      reason += '; the base of the recipes is diffusion_jax.configs.base'
    raise UserError(f'the config {path} cannot be used: {reason}') from error


def recipes() -> dict[str, Path]:
  """Return the recipes in the package by name, such as openmoji/quickstart; sorted."""
  found = {}
  for folder in map(Path, configs.__path__):
    for file in folder.rglob('*.py'):
      if file.name not in ('__init__.py', 'base.py'):
        found[file.relative_to(folder).with_suffix('').as_posix()] = file
  return dict(sorted(found.items()))


def _find(path: str) -> Path:
  """Return a file that is there, or else the recipe of this name."""
  file = Path(path)
  if file.suffix == '.py' and file.is_file():
    return file
  known = recipes()
  name = path.removeprefix('configs/').removesuffix('.py')
  if name in known:
    return known[name]
  close = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {close[0]}?' if close else 'give a file or one of ' + ', '.join(known) + '.'
  raise UserError(f'there is no config {path}; {hint}')


def _check_keys(config: ConfigDict, overrides: Sequence[str]) -> None:
  known = [f'config.{key}' for key in flatten(config.to_dict())]
  for override in overrides:
    name = override.lstrip('-').partition('=')[0]
    if override.startswith('-') and not any(f'{key}.'.startswith(f'{name}.') for key in known):
      close = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {close[0]}?' if close else 'see the config file for its keys.'
      raise UserError(f'{name} is not a known key; {hint}')
