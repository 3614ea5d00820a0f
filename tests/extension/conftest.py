"""Parts from outside of the package: each is one file, which registers itself.

`train` learns of it from the config file, which imports it; the other commands from
DIFFUSION_JAX_PLUGINS, for they open runs, whose files are data and name no code.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from diffusion_jax import registry
from tests import tiny

PARTS = Path(__file__).with_name('parts')
TABLES = [one for one in vars(registry).values() if isinstance(one, registry.Table)]


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """outside(name): a module with one of PARTS, alone in a folder of the path; its name."""
  kept = [(table, dict(table)) for table in TABLES]
  modules = []

  def use(name):
    folder, module = tmp_path / 'outside', f'outside_{name}'
    folder.mkdir()
    shutil.copy(PARTS / f'{name}.py', folder / f'{module}.py')
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(registry.PLUGINS, module)
    registry.import_plugins.cache_clear()
    importlib.invalidate_caches()
    modules.append(module)
    return module

  yield use
  for module in modules:
    sys.modules.pop(module, None)
  for table, rows in kept:
    table.clear()
    table.update(rows)
  registry.import_plugins.cache_clear()


@pytest.fixture
def forget():
  """forget(module): what a process that has not read the config file knows of a part."""

  def run(module):
    sys.modules.pop(module, None)
    for table in TABLES:
      for name in [name for name, row in table.items() if f'{row}'.startswith(f'{module}:')]:
        del table[name]
    registry.import_plugins.cache_clear()

  return run


@pytest.fixture
def trained_with(tmp_path, command, forget):
  """trained_with(module, values): workdir of a run whose config file imports the module."""

  def run(module, values):
    recipe, workdir = tmp_path / 'recipe.py', tmp_path / 'run'
    tiny.write_config(recipe, values)
    recipe.write_text(f'import {module}\n{recipe.read_text()}')
    assert command('train', '--config', recipe, '--workdir', workdir, '--quiet') == 0
    forget(module)
    return workdir

  return run
