"""Config files: those of the package by name, and any other; overrides from the command line."""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion_jax import configs
from diffusion_jax.errors import UserError, shown

_BOOLEANS = ('', 'true', 'false', 't', 'f', '1', '0')
"""As the command line reads them."""


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """Run a config file and apply overrides such as '--config.loop.batch_size=8'.

  path: a file, or a packaged recipe, such as openmoji/quickstart. overrides: keys that the file
  does not set are Python literals or texts, checked by `config.parse`. UserError: no such file, an
  error in it, or a value of another type than the one it replaces.
  """
  file, values = _find(path), flags.FlagValues()
  arguments = ['diffusion_jax', *overrides]
  try:
    config = _run(file).unlock()
    for override in overrides:
      name, _, value = override.lstrip('-').partition('=')
      keys = name.split('.')[1:]
      section, last = _make_section(config, keys[:-1]), ''.join(keys[-1:])
      if _is_of_another_kind(value, section.get(last)):
        del section[last]
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, lock_config=False, accept_new_attributes=True,
      sys_argv=arguments,
    )
    values(arguments)
    return config
  except UserError:
    raise
  except Exception as error:  # A config file is Python, so anything may come out of it.
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name == 'configs':
      reason += '; the base of the recipes is diffusion_jax.configs.base'
    raise UserError(f'the config {path} cannot be used: {reason}') from error


def _is_of_another_kind(value: str, before: Any) -> bool:
  """Return whether a value takes the place of one of another type, which parsing would refuse.

  Several numbers of one, such as a height and a width, or a dictionary, and the other way round; a
  name of True or False; anything of a list.
  """
  if isinstance(before, bool):
    return value.lower() not in _BOOLEANS
  if isinstance(before, int):
    return value[:1] in ('(', '[', '{')
  if isinstance(before, (tuple, list)):
    return isinstance(before, list) or value[:1] == '{' or value.isdecimal()
  return isinstance(before, ConfigDict) and (value[:1] in ('(', '[') or value.isdecimal())


def _run(file: Path) -> ConfigDict:
  spec = importlib.util.spec_from_file_location('config_config', file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # For parts that it registers by its own name.
  spec.loader.exec_module(module)
  return module.get_config()


def _make_section(config: ConfigDict, keys: Sequence[str]) -> ConfigDict:
  for key in keys:
    if key not in config:
      config[key] = ConfigDict()
    config = config[key]
  return config


def recipes() -> dict[str, Path]:
  """Return the recipes in the package by name, such as openmoji/quickstart; sorted."""
  found = {}
  for folder in map(Path, configs.__path__):
    for file in folder.rglob('*.py'):
      if file.name not in ('__init__.py', 'base.py'):
        found[file.relative_to(folder).with_suffix('').as_posix()] = file
  return dict(sorted(found.items()))


def summary(recipe: Path) -> str:
  """Return what a recipe says of itself in its first line."""
  text = ast.get_docstring(ast.parse(recipe.read_bytes())) or ''
  return text.partition('\n')[0]


def find_recipe(name: str) -> Path:
  """Return the file of a recipe. UserError, which names the nearest ones, where there is none."""
  known, own = recipes(), name.removeprefix('configs/').removesuffix('.py')
  if own in known:
    return known[own]
  near = _nearest(own, known)
  hint = f'did you mean {" or ".join(near)}? If not, ' if near else ''
  raise UserError(
    f'there is no config {shown(name)}; {hint}python -m diffusion_jax configs lists the recipes of '
    'the package.'
  )


def _nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
  """Return the recipes whose name, or its last part, is most like that of another, best first."""
  likeness = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
  last = lambda path: path.rpartition('/')[2]
  asked = name.lower()
  found = {
    other: max(likeness(asked, other), likeness(last(asked), last(other))) for other in known
  }
  best = sorted(found, key=found.get, reverse=True)[:most]
  return [other for other in best if found[other] > 0.6]


def _find(path: str) -> Path:
  """Return a file that is there, or else the recipe of this name."""
  file = Path(path)
  return file if file.suffix == '.py' and file.is_file() else find_recipe(path)
