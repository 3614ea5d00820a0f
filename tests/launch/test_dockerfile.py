"""The Dockerfile, as far as a machine without an engine can follow it."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from tests.tiny import ROOT

KNOWN = {'FROM', 'ARG', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'CMD'}


def instructions(text):
  """(name, rest) of each, with lines that go on joined."""
  lines = '\n'.join(line for line in text.splitlines() if not line.startswith('#'))
  joined = re.sub(r'\\\n', ' ', lines).splitlines()
  return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


FILE = instructions((ROOT / 'Dockerfile').read_text())


def test_instructions_are_known_and_name_only_what_is_set():
  assert {name for name, _ in FILE} <= KNOWN
  assert [name for name, _ in FILE][:2] == ['ARG', 'FROM']
  known = set()
  for name, rest in FILE:
    assert set(re.findall(r'\$\{(\w+)\}', rest)) <= known, rest
    if name == 'FROM':
      assert re.fullmatch(r'python:[\w.${}-]+', rest)
      known = set()  # What stands before it is for it alone.
    elif name in ('ARG', 'ENV'):
      known |= {part.partition('=')[0] for part in shlex.split(rest)}
  version = FILE[0][1].partition('=')[2]
  required = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['requires-python']
  assert [*map(int, version.split('.'))] >= [*map(int, required.removeprefix('>=').split('.'))]


def test_what_is_copied_is_there_and_not_ignored():
  kept = {
    line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')
  }
  copied = set()
  for name, rest in FILE:
    if name == 'COPY':
      sources = rest.split()[:-1]
      assert all((ROOT / source).exists() for source in sources), rest
      copied |= {source.split('/')[0] for source in sources}
  assert copied == kept


@pytest.mark.parametrize('platform', ['cuda13', 'cuda12', 'tpu'])
def test_jax_has_such_an_extra(platform):
  assert platform in importlib.metadata.metadata('jax').get_all('Provides-Extra')
  assert platform in (ROOT / 'Dockerfile').read_text().partition('FROM')[0]


def test_its_steps_install_what_the_launcher_runs(tmp_path):
  """In a folder for the image's, without an index; JAX for the platform is left out."""
  place, python, values = tmp_path / 'place', tmp_path / 'v' / 'bin' / 'python', {}
  venv.create(tmp_path / 'v', with_pip=False, symlinks=True)
  inherited = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}

  def said(*command, cwd=place, **env):
    done = subprocess.run(
      [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300,
      env=inherited | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  site = said(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path)
  # What it depends on is here already.
  with open(os.path.join(site.strip(), 'dependencies.pth'), 'w', encoding='utf-8') as file:
    file.write(sysconfig.get_path('purelib') + '\n')
  for name, rest in FILE:
    if name == 'ARG':
      values |= dict([rest.split('=')])
    elif name == 'WORKDIR':
      place.mkdir()
    elif name == 'COPY':
      *sources, target = rest.split()
      for source in sources:
        if (ROOT / source).is_dir():
          ignored = shutil.ignore_patterns('__pycache__')
          shutil.copytree(ROOT / source, place / target, ignore=ignored, dirs_exist_ok=True)
        else:
          (place / target).mkdir(exist_ok=True)
          shutil.copy(ROOT / source, place / target)
    elif name == 'RUN':
      command = re.sub(r'\$\{(\w+)\}', lambda match, of=values: of[match[1]], rest)
      assert command.startswith('python -m pip install ')
      given = [part for part in shlex.split(command)[4:] if not part.startswith('jax[')]
      said(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-index',
           '--no-build-isolation', '--quiet', *given)
  assert 'openmoji/quickstart' in said(python, '-m', 'diffusion_jax', 'configs', cwd=tmp_path)
  for platform in ('gpu', 'tpu'):
    out = said('bash', 'launch/train.sh', platform, '--config', 'configs/toy/edm.py', '--workdir',
               '/runs/x', '--dry-run')
    assert '-m diffusion_jax train' in out
