"""What a person gets who installs: from a clone of any name, and from a wheel in any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.tiny import ROOT

OWN = """
from diffusion_jax.configs.base import base

def get_config():
  config = base('toy')
  config.loop.batch_size = 96
  return config
"""
READ = """
import pathlib, sys
from diffusion_jax.cli.configs import copy
from diffusion_jax.config import parse
from diffusion_jax.recipe import load_config, recipes
print(len([parse(load_config(name)) for name in recipes()]), 'recipes')
print(load_config(sys.argv[1]).loop.batch_size)
copied = copy('finetune/sd15_v', pathlib.Path())
print(load_config(str(copied)).to_dict() == load_config('finetune/sd15_v').to_dict())
"""


def said(*command, cwd, **env):
  """Standard output of a process that finds nothing of this checkout by itself."""
  inherited = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  done = subprocess.run(
    [str(part) for part in command], cwd=cwd, env=inherited | env, capture_output=True, text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
  """A folder with a clone that is named as the package is."""
  folder = tmp_path_factory.mktemp('clones')
  shutil.copytree(ROOT, folder / 'diffusion_jax', ignore=shutil.ignore_patterns(
    '.git', '.venv', 'tests', '__pycache__', '*.egg-info', 'benchmarks',
  ))
  return folder


def test_a_clone_does_not_hide_its_own_editable_install(clone, tmp_path):
  venv.create(tmp_path / 'v', with_pip=False, symlinks=True)
  python = tmp_path / 'v' / 'bin' / 'python'
  site = said(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path)
  said(
    sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps',
    '--no-build-isolation', '-e', clone / 'diffusion_jax', cwd=tmp_path,
    PYTHONPATH=sysconfig.get_path('purelib'),
  )
  # Recipes that a clone has are not copied.
  assert not os.path.exists(os.path.join(site.strip(), 'diffusion_jax'))
  # What it depends on is here already; a folder that another adds does not read its .pth files.
  with open(os.path.join(site.strip(), 'dependencies.pth'), 'w', encoding='utf-8') as file:
    file.write(sysconfig.get_path('purelib') + '\n')
  for cwd in (clone, clone / 'diffusion_jax', tmp_path):
    out = said(python, '-c', 'import diffusion_jax; print(diffusion_jax.__file__)', cwd=cwd)
    assert out.strip() == str(clone / 'diffusion_jax' / 'diffusion_jax' / '__init__.py')
  assert said(python, '-m', 'diffusion_jax', '--version', cwd=clone).startswith('diffusion_jax ')


def test_a_wheel_holds_the_recipes_and_the_models(clone, tmp_path):
  said(
    sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path,
    clone / 'diffusion_jax', cwd=tmp_path,
  )
  wheel, = tmp_path.glob('*.whl')
  said(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', tmp_path / 'site', wheel,
       cwd=tmp_path)
  own = tmp_path / 'own.py'
  own.write_text(OWN, encoding='utf-8')
  out = said(sys.executable, '-c', READ, own, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
  recipes = [
    path for path in (ROOT / 'configs').rglob('*.py')
    if path.name not in ('__init__.py', 'base.py')
  ]
  assert out.splitlines() == [f'{len(recipes)} recipes', '96', 'True']
  packaged = tmp_path / 'site' / 'diffusion_jax'
  for folder, here in (('assets', ROOT / 'diffusion_jax'), ('configs', ROOT)):
    files = lambda root: {p.relative_to(root) for p in root.rglob('*.*')
                          if p.is_file() and p.suffix != '.pyc'}
    assert files(packaged / folder) == files(here / folder)
